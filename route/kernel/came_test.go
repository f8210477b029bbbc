package kernel

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
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
			inNamespace(t, func(t *testing.T) { conntrackFlushed(t, loose) })
		})
	}
}

func conntrackFlushed(t *testing.T, loose string) {
	x := visitors{t: t, w: newWorld(t), accepted: make(chan net.Conn, 16)}
	x.w.speaksFromFar(t)
	l, err := net.Listen("tcp", ":2222")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go x.accept(l)
	x.open("before")
	c := testConfig(t)
	if c.Kept, err = Established(); err != nil {
		t.Fatal(err)
	}
	h, tun := up(t, c)
	if err := writeSysctl("net/netfilter/nf_conntrack_tcp_loose", loose); err != nil {
		t.Fatal(err)
	}
	x.open("up")
	x.open("up, and then the filter was replaced")
	h.mu.Lock()
	err = h.applyFilter()
	h.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	x.flushedWhileTheySpeak()
	want := len(x.pairs)
	if loose == "0" {
		want -= 2 // those of before are never an entry of conntrack's
	}
	// A segment notes its connection only if it leaves nothing unacknowledged, since conntrack keeps an entry with
	// unacknowledged data for five minutes only: here it is the ACK of what the host says last.
	for _, p := range x.pairs {
		if err := say(p.here, p.out); err != nil {
			t.Errorf("%s: %v", p.name, err)
		}
	}
	// On a loaded machine one of them may have missed its chance before the first flush.
	testkit.Eventually(t, fmt.Sprintf("%d connections to be noted", want), func() bool {
		n := x.noted()
		return n == want || n == want-1
	})
	x.end()
	if loose == "1" {
		testkit.Eventually(t, "ended connections are forgotten", func() bool { return x.noted() == 0 })
	}
	x.flush()
	x.w.mustBeClosed(t, "steered")
	down(t, h)
	tun.Close()
}

// visitors are connections from outside to a server on this host.
type visitors struct {
	t        *testing.T
	w        *world
	accepted chan net.Conn
	pairs    []visitor
}

type visitor struct {
	name      string
	out, here net.Conn
}

func (x *visitors) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = c.Write([]byte("hello"))
		x.accepted <- c
	}
}

func (x *visitors) open(when string) {
	x.t.Helper()
	for _, a := range []string{"198.51.100.2:2222", "[2001:db8:1::2]:2222"} {
		out := x.w.dialIn(x.t, "tcp", a)
		if out == nil {
			x.t.Fatal("no connection")
		}
		x.pairs = append(x.pairs, visitor{when + " " + a, out, <-x.accepted})
	}
}

// flushedWhileTheySpeak flushes conntrack before each word, twice: what was picked up once is known still.
func (x *visitors) flushedWhileTheySpeak() {
	x.t.Helper()
	for range 2 {
		for _, first := range []string{"outside", "host"} {
			for _, p := range x.pairs {
				x.flush()
				a, b := p.out, p.here
				if first == "host" {
					a, b = b, a
				}
				for range 2 {
					if err := say(a, b); err != nil {
						x.t.Errorf("%s: %s speaks first: %v", p.name, first, err)
					}
					if err := say(b, a); err != nil {
						x.t.Errorf("%s: %s speaks first, the answer: %v", p.name, first, err)
					}
				}
			}
		}
	}
}

// end closes all connections, from either end.
func (x *visitors) end() {
	x.t.Helper()
	for _, p := range x.pairs { // a FIN without an entry is invalid to conntrack, and forgets nothing
		if err := say(p.out, p.here); err != nil {
			x.t.Errorf("%s: %v", p.name, err)
		}
	}
	for i, p := range x.pairs {
		first, second := p.out, p.here
		if i%2 == 1 {
			first, second = second, first
		}
		first.Close()
		second.Close()
	}
}

func (x *visitors) flush() {
	x.t.Helper()
	if out, err := exec.Command("conntrack", "-F").CombinedOutput(); err != nil {
		x.t.Fatalf("conntrack -F: %v: %s", err, out)
	}
}

// noted counts the connections that the filter knows.
func (x *visitors) noted() (n int) {
	for _, s := range []string{"came4", "came6"} {
		n += strings.Count(nft(x.t, "list", "set", "inet", "viasocks", s), "tcp . ")
	}
	return n
}

// say sends a word from one end to the other.
func say(from, to net.Conn) error {
	_ = to.SetDeadline(time.Now().Add(testkit.Patience))
	_ = from.SetDeadline(time.Now().Add(testkit.Patience))
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
