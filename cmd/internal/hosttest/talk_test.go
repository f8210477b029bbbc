package hosttest

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestLeakOfOldTalk: what the host opened before viasocks is no connection from outside, even when the far end is the
// first to say something that viasocks sees: a host that tracked nothing before learns the direction from that.
func TestLeakOfOldTalk(t *testing.T) {
	if !apart(t) {
		return
	}
	for _, tt := range []struct {
		tracked bool
		include bool
	}{{true, false}, {false, false}, {false, true}} {
		t.Run(fmt.Sprintf("tracked=%v,include=%v", tt.tracked, tt.include), func(t *testing.T) {
			w := newWorld(t)
			if !tt.tracked {
				w.trackNothing()
			}
			rec := newRecorder(w)
			if err := setProxyName(proxy4); err != nil {
				t.Fatal(err)
			}
			rec.known(w.proxy(proxy4 + ":1080"))
			w.talkers()
			var conns []net.Conn
			for _, k := range oldTalk {
				w.in("host", func() error {
					c, err := net.Dial(k.network, k.to)
					if err != nil {
						return err
					}
					t.Cleanup(func() { c.Close() })
					conns = append(conns, c)
					return nil
				})
			}
			// Each says something each 10 ms, as its far end does.
			stop := make(chan struct{})
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					select {
					case <-stop:
						return
					case <-time.After(10 * time.Millisecond):
					}
					for _, c := range conns {
						_ = writeNow(c, []byte("old talk"))
					}
				}
			}()
			defer func() { close(stop); <-done }()

			count := func() map[netip.Addr]int {
				rec.take()
				testkit.Pace(400 * time.Millisecond)
				n := map[netip.Addr]int{}
				for _, s := range rec.take() {
					n[s.what.dst]++
				}
				return n
			}
			before := count()
			for _, k := range oldTalk {
				if before[netip.MustParseAddrPort(k.to).Addr()] == 0 {
					t.Fatalf("control: %s to %s is not seen: the test would prove nothing", k.network, k.to)
				}
			}
			flags := []string{"--proxy", proxyURL}
			if tt.include { // its far ends are
				flags = append(flags, "--include", "203.0.113.0/24,2001:db8:f::/64")
			}
			d := w.up(flags...)
			if why := w.notClosed(); why != "" {
				t.Skip(why)
			}
			check := func(when string) {
				t.Helper()
				seen := count()
				for _, k := range oldTalk {
					if n := seen[netip.MustParseAddrPort(k.to).Addr()]; n > 0 {
						t.Errorf("%s: %s to %s goes on around viasocks: %d frames", when, k.network, k.to, n)
					}
				}
			}
			check("running")
			d.kill()
			check("killed")
		})
	}
}

var oldTalk = []struct{ network, to string }{
	{"tcp", "203.0.113.4:78"}, {"tcp", "[2001:db8:f::4]:78"},
	{"udp", "203.0.113.5:79"}, {"udp", "[2001:db8:f::5]:79"},
}

// talkers are servers in the world that go on talking to whoever came once.
func (w *world) talkers() {
	w.t.Helper()
	serve(w.listen("world", ":78"), func(c net.Conn) {
		go drain(c)
		for {
			if _, err := c.Write([]byte("talk")); err != nil {
				return
			}
			testkit.Pace(7 * time.Millisecond)
		}
	})
	for _, to := range []string{oldTalk[2].to, oldTalk[3].to} {
		c := w.packets("world", to)
		go func() {
			b := make([]byte, 100)
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			go func() {
				for {
					if _, _, err := c.ReadFrom(b); err != nil {
						return
					}
				}
			}()
			for {
				if _, err := c.WriteTo([]byte("talk"), from); err != nil {
					return
				}
				testkit.Pace(7 * time.Millisecond)
			}
		}()
	}
}
