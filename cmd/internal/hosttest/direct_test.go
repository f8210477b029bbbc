package hosttest

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestUpDirectOnly: the host is steered without any proxy. A rule lets a network out; what no rule matches is refused at
// once and reaches nobody.
func TestUpDirectOnly(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	serve(w.listen("world", ":77"), echo)
	d := w.up("--rule", "proto tcp dst 203.0.113.0/28 direct", "--dns", "tcp://203.0.113.9")
	c, err := w.dial("host", netipAddrPort("203.0.113.7", 77))
	if err == nil {
		err = exchange(c, 1000)
	}
	if err != nil {
		t.Errorf("what a rule lets out: %v", err)
	}
	refused := uint64(0)
	testkit.Tries(t, "what no rule matches", func() error {
		refused++
		start := time.Now()
		c, err := w.dial("host", netipAddrPort("203.0.113.77", 77))
		if took := time.Since(start); !errors.Is(err, syscall.ECONNREFUSED) || took > 2*time.Second {
			return fmt.Errorf("%v, %w after %v", c, err, took)
		}
		return nil
	})
	s := ask[control.Status](w, "status")
	if len(s.Upstreams) != 1 || s.Upstreams[0].Name != "direct" || s.TCP.Refused != refused {
		t.Errorf("status: %+v %+v", s.Upstreams, s.TCP)
	}
	if n := strings.Count(d.log.String(), "level=WARN"); n > 0 {
		t.Errorf("%d warnings:\n%s", n, d.log)
	}
	d.signal(syscall.SIGTERM)
	if err := d.wait(); err != nil {
		t.Error(err)
	}
}
