package stack

import "github.com/viasocks/viasocks/stack/flow"

func appendUnreachable(b []byte, quote []byte, why flow.Refusal) (out []byte, ok bool) {
	return b, false
}
