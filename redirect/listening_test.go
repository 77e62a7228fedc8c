// SPDX-License-Identifier: Apache-2.0

package redirect

import "testing"

func TestProcAddress(t *testing.T) {
	for in, want := range map[string]string{
		"0100007F:3E81":                         "127.0.0.1:16001",
		"00000000:0050":                         "0.0.0.0:80",
		"00000000000000000000000001000000:3E81": "[::1]:16001",
		"B80D0120000000000000000001000000:0016": "[2001:db8::1]:22",
	} {
		if got, ok := parseProcAddress(in); !ok || got.String() != want {
			t.Errorf("%s: %s, %v; want %s", in, got, ok, want)
		}
	}
	for _, in := range []string{"", ":", "0100007F", "01:02", "zz00007F:0001", "0100007F:10000"} {
		if got, ok := parseProcAddress(in); ok {
			t.Errorf("%q is read as %s", in, got)
		}
	}
}
