// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"fmt"
	"math/big"
	"regexp"
)

// Quantity is an amount of a resource, as Kubernetes writes it; empty: not said. It is a flag value.
type Quantity string

// quantity is k8s.io/apimachinery's resource.Quantity, without a sign; no amount needs an exponent of three digits.
var quantity = regexp.MustCompile(`^([0-9]+(?:\.[0-9]*)?)([numkMGTPE]|[KMGTPE]i|[eE][0-9]{1,2})?$`)

func (q *Quantity) String() string { return string(*q) }

func (q *Quantity) Set(s string) error {
	if s != "" && !quantity.MatchString(s) {
		return fmt.Errorf("%q is no quantity, such as 100m or 64Mi", s)
	}
	*q = Quantity(s)
	return nil
}

// Type names the value in help texts.
func (q *Quantity) Type() string { return "quantity" }

// suffixes are what stands behind a quantity, as powers of a base.
var suffixes = map[string]struct{ base, power int64 }{
	"n": {1000, -3}, "u": {1000, -2}, "m": {1000, -1}, "": {1000, 0},
	"k": {1000, 1}, "M": {1000, 2}, "G": {1000, 3}, "T": {1000, 4}, "P": {1000, 5}, "E": {1000, 6},
	"Ki": {1024, 1}, "Mi": {1024, 2}, "Gi": {1024, 3}, "Ti": {1024, 4}, "Pi": {1024, 5}, "Ei": {1024, 6},
}

// value is the amount; nil where it is not said.
func (q Quantity) value() *big.Rat {
	m := quantity.FindStringSubmatch(string(q))
	if m == nil {
		return nil
	}
	number, exponent := m[1], ""
	suffix, isSuffix := suffixes[m[2]]
	if !isSuffix {
		exponent = m[2]
	}
	v, ok := new(big.Rat).SetString(number + exponent)
	if !ok {
		return nil
	}
	for range suffix.power {
		v.Mul(v, big.NewRat(suffix.base, 1))
	}
	for range -suffix.power {
		v.Mul(v, big.NewRat(1, suffix.base))
	}
	return v
}
