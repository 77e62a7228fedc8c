// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// note is what an installation leaves behind for whoever comes later, as the comment of a rule in the chain PILLION_POLICY.
// That chain is the first thing to be made and the last to go, so that whatever else is there is told of:
//
//	pillion backend=tproxy slot=0 plan=8d2f6a01 tracked=true sysctl=0,0,0,0 made=ip.mangle,ip.filter
type note struct {
	Backend string
	Slot    config.Slot
	Plan    string   // hash of the plan
	Tracked bool     // connections were tracked when the plan was made
	Sysctls []string // values found, in the order of sysctls; "" where one is not changed
	Made    []string // nf_tables objects that were not there before: FAMILY.TABLE or FAMILY.TABLE.CHAIN
}

const notePrefix = "pillion backend="

func (n note) String() string {
	return fmt.Sprintf("%s%s slot=%d plan=%s tracked=%t sysctl=%s made=%s", notePrefix, n.Backend, n.Slot, n.Plan, n.Tracked,
		strings.Join(n.Sysctls, ","), strings.Join(n.Made, ","))
}

// parseNote reads a comment; ok is false where it is no note.
func parseNote(comment string) (n note, ok bool) {
	if !strings.HasPrefix(comment, notePrefix) {
		return n, false
	}
	for _, field := range strings.Fields(comment)[1:] {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "backend":
			n.Backend = value
		case "slot":
			v, err := strconv.ParseUint(value, 10, 8)
			if err != nil || v >= config.Slots {
				return n, false
			}
			n.Slot = config.Slot(v)
		case "plan":
			n.Plan = value
		case "tracked":
			n.Tracked = value == "true"
		case "sysctl":
			if value != "" {
				n.Sysctls = strings.Split(value, ",")
			}
		case "made":
			if value != "" {
				n.Made = strings.Split(value, ",")
			}
		}
	}
	return n, n.Backend == TProxy || n.Backend == Redirect
}

// noteOf finds the note of what is installed.
func noteOf(found []state) (note, bool) {
	for _, s := range found {
		for _, r := range s.Rules {
			if n, ok := parseNote(commentOf(r)); ok && chainOf(r) == chainPolicy {
				return n, true
			}
		}
	}
	return note{}, false
}

// planHash covers everything that is installed but interfaces, which come and go.
func planHash(p redirect.Plan) (string, error) {
	p.Routes = nil
	text, err := json.Marshal(p)
	if err != nil {
		return "", fmt.Errorf("hash the plan: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:4]), nil
}

// The policy travels with the capture, behind the note in the same chain, to which nothing jumps.
const (
	policyComment = "pillion-policy:"
	policyChunk   = 180 // a comment has 255 bytes at most (XT_MAX_COMMENT_LEN)
)

// policyRules are the rules whose comments are the note and the policy.
func policyRules(n note, policy config.Capture) ([]redirect.PacketRule, error) {
	text, err := json.Marshal(policy)
	if err != nil {
		return nil, fmt.Errorf("write the policy: %w", err)
	}
	rules := []redirect.PacketRule{{Chain: chainPolicy, Target: "-j RETURN", Why: n.String()}}
	for i, chunk := range slices.Collect(slices.Chunk([]byte(base64.RawURLEncoding.EncodeToString(text)), policyChunk)) {
		rules = append(rules, redirect.PacketRule{Chain: chainPolicy, Target: "-j RETURN", Why: fmt.Sprintf("%s%d:%s", policyComment, i, chunk)})
	}
	return rules, nil
}

// policyOf reads back what policyRules wrote.
func policyOf(found []state) (*config.Capture, error) {
	for _, s := range found {
		var text strings.Builder
		for _, r := range s.Rules {
			if rest, ok := strings.CutPrefix(commentOf(r), policyComment); ok && chainOf(r) == chainPolicy {
				_, chunk, _ := strings.Cut(rest, ":")
				text.WriteString(chunk)
			}
		}
		if text.Len() == 0 {
			continue
		}
		b, err := base64.RawURLEncoding.DecodeString(text.String())
		var policy config.Capture
		if err == nil {
			err = json.Unmarshal(b, &policy)
		}
		if err != nil {
			return nil, fmt.Errorf("read the policy of the capture: %w", err)
		}
		return &policy, nil
	}
	return nil, nil
}
