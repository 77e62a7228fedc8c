// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

// TestPublications: what --publish takes, and how it is shown; an empty want is a refusal.
func TestPublications(t *testing.T) {
	for text, want := range map[string]string{
		"8080": "8080:8080", "8080:80": "8080:80", "127.0.0.1:8080": "127.0.0.1:8080:8080", "127.0.0.1:8080:80": "127.0.0.1:8080:80",
		"[::1]:8080": "[::1]:8080:8080", "[::1]:8080:80": "[::1]:8080:80", "1,2:3": "1:1,2:3",
		"": "", "0": "", "65536": "", "-1": "", "a": "", "1:": "", ":1": "", "1:2:3": "", "1.2.3:4": "", "[::1]": "", "[::1": "", "::1:8080": "", "[1.2.3.4:5": "", "1,": "",
	} {
		var p publications
		err := p.Set(text)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q is taken as %s", text, p.String())
		case want != "" && (err != nil || p.String() != want):
			t.Errorf("%q is %s (%v), want %s", text, p.String(), err, want)
		}
	}
}
