package kernel

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Somebody flushes conntrack while connections from outside are open, opened before and while the host is steered. They
// live on, whoever speaks first after that, and also where conntrack does not pick connections up. A connection that this
// host began, and one that has ended, get nothing by it.
func TestConntrackFlushed(t *testing.T) {
	if _, err := exec.LookPath("conntrack"); err != nil {
		t.Skip(err)
	}
	for _, loose := range []string{"1", "0"} {
		t.Run("loose "+loose, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				w := newWorld(t)
				w.in(func() {
					ip(
						t,
						"route replace 198.51.100.2/32 dev eth0p src "+far4,
						"-6 route replace 2001:db8:1::2/128 dev eth0p src "+far6,
					)
				})
				accepted := make(chan net.Conn, 16)
				l, err := net.Listen("tcp", ":2222")
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				go func() {
					for {
						c, err := l.Accept()
						if err != nil {
							return
						}
						_, _ = c.Write([]byte("hello"))
						accepted <- c
					}
				}()
				type pair struct {
					name      string
					out, here net.Conn
				}
				var pairs []pair
				open := func(when string) {
					t.Helper()
					for _, a := range []string{"198.51.100.2:2222", "[2001:db8:1::2]:2222"} {
						out := w.dialIn(t, "tcp", a)
						if out == nil {
							t.Fatal("no connection")
						}
						pairs = append(pairs, pair{when + " " + a, out, <-accepted})
					}
				}
				open("before")
				c := testConfig(t)
				if c.Kept, err = Established(); err != nil {
					t.Fatal(err)
				}
				h, tun := up(t, c)
				if err := writeSysctl("net/netfilter/nf_conntrack_tcp_loose", loose); err != nil {
					t.Fatal(err)
				}
				open("up")
				open("up, and then the filter was replaced")
				h.mu.Lock()
				err = h.applyFilter()
				h.mu.Unlock()
				if err != nil {
					t.Fatal(err)
				}
				say := func(from, to net.Conn) error {
					_ = to.SetDeadline(time.Now().Add(patience))
					_ = from.SetDeadline(time.Now().Add(patience))
					if _, err := from.Write([]byte("ping")); err != nil {
						return err
					}
					b := make([]byte, 10)
					n, err := to.Read(b)
					if err == nil && string(b[:n]) != "ping" {
						err = fmt.Errorf("got %q", b[:n])
					}
					return err
				}
				flush := func() {
					t.Helper()
					if out, err := exec.Command("conntrack", "-F").CombinedOutput(); err != nil {
						t.Fatalf("conntrack -F: %v: %s", err, out)
					}
				}
				for range 2 { // what was picked up once is known still
					for _, first := range []string{"outside", "host"} {
						for _, p := range pairs {
							flush()
							a, b := p.out, p.here
							if first == "host" {
								a, b = b, a
							}
							for range 2 {
								if err := say(a, b); err != nil {
									t.Errorf("%s: %s speaks first: %v", p.name, first, err)
								}
								if err := say(b, a); err != nil {
									t.Errorf("%s: %s speaks first, the answer: %v", p.name, first, err)
								}
							}
						}
					}
				}
				came := func() (n int) {
					for _, s := range []string{"came4", "came6"} {
						n += strings.Count(nft(t, "list", "set", "inet", "viasocks", s), "tcp . ")
					}
					return n
				}
				want := len(pairs)
				if loose == "0" {
					want -= 2 // those of before are never an entry of conntrack's
				}
				// A segment notes its connection only if it leaves nothing unacknowledged, since conntrack keeps an entry with
				// unacknowledged data for five minutes only: here it is the ACK of what the host says last.
				for _, p := range pairs {
					if err := say(p.here, p.out); err != nil {
						t.Errorf("%s: %v", p.name, err)
					}
				}
				// On a loaded machine one of them may have missed its chance before the first flush.
				eventually(
					t,
					fmt.Sprintf("%d connections to be noted", want),
					func() bool { n := came(); return n == want || n == want-1 },
				)
				for _, p := range pairs { // a FIN without an entry is invalid to conntrack, and forgets nothing
					if err := say(p.out, p.here); err != nil {
						t.Errorf("%s: %v", p.name, err)
					}
				}
				for i, p := range pairs {
					first, second := p.out, p.here
					if i%2 == 1 {
						first, second = second, first
					}
					first.Close()
					second.Close()
				}
				if loose == "1" {
					eventually(t, "ended connections are forgotten", func() bool { return came() == 0 })
				}
				flush()
				w.mustBeClosed(t, "steered")
				down(t, h)
				tun.Close()
			})
		})
	}
}

// A SYN that nobody completes notes nothing.
func TestForgedSYNNotesNothing(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		l := listenHere(t, ":2222")
		defer l.Close()
		h, tun := up(t, testConfig(t))
		w.in(func() {
			// The world does not answer the SYN-ACK.
			nft(t, "add table inet deaf")
			nft(t, "add chain inet deaf in { type filter hook prerouting priority -400; }")
			nft(t, "add rule inet deaf in tcp sport 2222 drop")
			for range 3 {
				_ = probe{typ: unix.SOCK_STREAM, dst: "198.51.100.2", port: 2222}.send()
			}
		})
		if s := nft(t, "list", "set", "inet", "viasocks", "came4"); strings.Contains(s, "tcp . ") {
			t.Errorf("noted: %s", s)
		}
		down(t, h)
		tun.Close()
	})
}
