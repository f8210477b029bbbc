package kernel

import (
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// inboundCase is a case of TestInbound.
type inboundCase struct{ strict, exclude, carry bool }

// Connections from outside: open before (tracked by nobody), while up, after the daemon's death; and all of that with
// strict reverse path filtering. An excluded device changes nothing about them, and is not subject to CarryInbound.
func TestInbound(t *testing.T) {
	for _, tt := range []inboundCase{
		{}, {strict: true}, {exclude: true}, {strict: true, exclude: true}, {exclude: true, carry: true},
	} {
		inNamespace(t, func(t *testing.T) { inbound(t, tt) })
	}
}

func inbound(t *testing.T, tt inboundCase) {
	w := newWorld(t)
	if tt.strict {
		strictPaths(t)
	}
	w.speaksFromFar(t)
	l := listenHere(t, ":2222")
	defer l.Close()
	u := udpEcho(t, ":2223")
	defer u.Close()
	b4, b6 := w.dialIn(t, "tcp", "198.51.100.2:2222"), w.dialIn(t, "tcp", "[2001:db8:1::2]:2222")
	if b4 == nil || b6 == nil {
		return
	}
	defer b4.Close()
	defer b6.Close()
	if b4.LocalAddr().(*net.TCPAddr).IP.String() != far4 {
		t.Errorf("the client is at %v", b4.LocalAddr())
	}
	c := testConfig(t)
	c.Guard = time.Second
	c.CarryInbound = tt.carry
	if tt.exclude {
		c.Exclude.Devices = []string{"eth0"}
	}
	var err error
	if c.Kept, err = Established(); err != nil || len(c.Kept) != 2 {
		t.Errorf("established: %v, %v", c.Kept, err)
	}
	h, tun := up(t, c)
	checkInbound(t, w, fmt.Sprintf("up, %+v", tt), b4, b6)
	h.Close() // as a kill does
	tun.Close()
	testkit.Pace(1100 * time.Millisecond) // the guard ends
	checkInbound(t, w, fmt.Sprintf("dead, %+v", tt), b4, b6)
	if !tt.exclude { // sockets that are bound to an excluded device go past the proxy
		w.mustBeClosed(t, "dead")
	} else if w.passes(false, probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777}.send) {
		t.Errorf("%+v: a datagram of a socket that is not bound to the device left", tt)
	}
	if _, err := Undo(c); err != nil {
		t.Error(err)
	}
	checkInbound(t, w, "down", b4, b6)
	if tt.strict && readSysctl(srcValidMark) != "0" {
		t.Error("src_valid_mark was not put back")
	}
}

// udpEcho sends each datagram back, until it is closed.
func udpEcho(t *testing.T, addr string) net.PacketConn {
	t.Helper()
	u, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 100)
		for {
			n, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = u.WriteTo(b[:n], from)
		}
	}()
	return u
}

// checkInbound wants answers from the host's servers, over the connections of before and over new ones.
func checkInbound(t *testing.T, w *world, when string, before ...net.Conn) {
	t.Helper()
	for _, c := range before {
		if err := talk(c); err != nil {
			t.Errorf("%s: connection of before, %v: %v", when, c.RemoteAddr(), err)
		}
	}
	for _, a := range []string{"198.51.100.2", "[2001:db8:1::2]"} {
		if c := w.dialIn(t, "tcp", a+":2222"); c != nil {
			if err := talk(c); err != nil {
				t.Errorf("%s: new connection to %s: %v", when, a, err)
			}
			c.Close()
		}
		w.in(func() {
			c, err := net.Dial("udp", a+":2223")
			if err == nil {
				err = talk(c)
				c.Close()
			}
			if err != nil {
				t.Errorf("%s: UDP to %s: %v", when, a, err)
			}
		})
	}
}

// serverFirstCase is a case of TestServerFirst.
type serverFirstCase struct {
	name    string
	carry   bool
	exclude string
	want    bool
}

// A server speaks first over connections that nobody had tracked before `up`. With CarryInbound only those that have an
// address of an excluded device are answered directly, also after the choice was changed.
func TestServerFirst(t *testing.T) {
	for _, tt := range []serverFirstCase{
		{"keep", false, "", true},
		{"carry", true, "", false},
		{"carry, the device is excluded", true, "eth0", true},
		{"carry, another device is excluded", true, "br0", false},
	} {
		for _, changed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, changed %v", tt.name, changed), func(t *testing.T) {
				inNamespace(t, func(t *testing.T) { serverFirst(t, tt, changed) })
			})
		}
	}
}

func serverFirst(t *testing.T, tt serverFirstCase, changed bool) {
	w := newWorld(t)
	w.speaksFromFar(t)
	l, err := net.Listen("tcp", ":2222")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var servers []net.Conn
	for _, host := range []string{"198.51.100.2:2222", "[2001:db8:1::2]:2222"} {
		var client net.Conn
		w.in(func() { client, err = net.Dial("tcp", host) })
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		servers = append(servers, in)
	}
	c := testConfig(t)
	c.Kept, _ = Established()
	choice := c
	choice.CarryInbound = tt.carry
	if tt.exclude != "" {
		choice.Exclude.Devices = []string{tt.exclude}
	}
	if !changed {
		c = choice
	}
	h, tun := up(t, c)
	if changed {
		if err := h.Change(choice); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range servers {
		send := func() error { _, err := s.Write([]byte("hello")); return err }
		if got := w.passes(tt.want, send); got != tt.want {
			t.Errorf("to %v: left directly: %v, want %v", s.RemoteAddr(), got, tt.want)
		}
	}
	down(t, h)
	tun.Close()
}
