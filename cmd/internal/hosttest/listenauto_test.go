package hosttest

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// TestListenAuto: a program of the host that asks the router of its network for a port by NAT-PMP is answered by viasocks,
// and the router hears nothing. A container is not answered.
func TestListenAuto(t *testing.T) {
	if !apart(t) {
		return
	}
	if _, err := exec.LookPath("natpmpc"); err != nil {
		t.Skip("natpmpc is not installed (scripts/deps.sh)")
	}
	w := newWorld(t)
	w.binding()
	w.sysctl("host", map[string]string{"net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/default/rp_filter": "1"})
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	d := w.up("--proxy", "socks5://"+proxy4, "--listen", "auto")
	l := w.listen("host", ":6885")
	out, _ := try("host", nil, "natpmpc", "-g", lanRouter4, "-a", "6885", "6885", "tcp", "600")
	if !strings.Contains(out, "Mapped public port 6885 protocol TCP to local port 6885 liftime 120") ||
		!strings.Contains(out, "Public IP address : "+proxy4) {
		t.Errorf("the router's answer: %s", out)
	}
	far := w.peer("203.0.113.201")
	w.sendBoth(far, w.acceptFrom(l, far))
	for _, gateway := range []string{lanRouter4, "198.18.0.2"} {
		out, err := try("ctr", nil, "timeout", "2", "natpmpc", "-g", gateway, "-a", "22", "22", "tcp", "600")
		if err == nil || strings.Contains(out, "Mapped") {
			t.Errorf("the container is answered by %s: %s", gateway, out)
		}
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "auto")
}

// TestListenAutoUDP: a program of the host that has sent nothing asks for a UDP port, and a peer reaches it there from its own
// address; the answer goes back the same way. A container is not answered.
func TestListenAutoUDP(t *testing.T) {
	if !apart(t) {
		return
	}
	if _, err := exec.LookPath("natpmpc"); err != nil {
		t.Skip("natpmpc is not installed (scripts/deps.sh)")
	}
	w := newWorld(t)
	w.binding()
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	rec.mu.Lock()
	rec.answers = func(p packet) bool { // datagrams for dante's relay and outer port, which can be any, and errors about its own
		return p.dst == addr(proxy4) && p.proto != syscall.IPPROTO_TCP
	}
	rec.mu.Unlock()
	d := w.up("--proxy", "socks5://"+proxy4, "--listen", "auto")
	c := w.packets("host", "0.0.0.0:6885")
	outer := w.udpPort(6885)
	peer := w.packets("world", "203.0.113.201:0")
	pass := func(what string, from, to net.PacketConn, where, want net.Addr) {
		t.Helper()
		if _, err := from.WriteTo([]byte(what), where); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		_ = to.SetReadDeadline(time.Now().Add(20 * time.Second))
		n, sender, err := to.ReadFrom(b)
		if err != nil || string(b[:n]) != what || sender.String() != want.String() {
			t.Fatalf("%q from %v, %v; want %q from %v", b[:n], sender, err, what, want)
		}
	}
	pass("from a peer", peer, c, outer, peer.LocalAddr())
	pass("an answer", c, peer, peer.LocalAddr(), outer)
	if out, err := try("ctr", nil, "timeout", "2", "natpmpc", "-g", lanRouter4, "-a", "22", "22", "udp", "600"); err == nil ||
		strings.Contains(out, "Mapped") {
		t.Errorf("the container is answered: %s", out)
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "auto, UDP")
}

// udpPort asks for a UDP port as a program of the host, and returns where peers reach it.
func (w *world) udpPort(port uint16) *net.UDPAddr {
	w.t.Helper()
	var outer int
	w.eventually(20*time.Second, "a UDP port", func() bool {
		out, _ := try("host", nil, "natpmpc", "-g", lanRouter4, "-a", fmt.Sprint(port), fmt.Sprint(port), "udp", "600")
		_, rest, _ := strings.Cut(out, "Mapped public port ")
		n, _ := fmt.Sscanf(rest, "%d protocol UDP", &outer)
		return n == 1
	})
	ports := ask[control.Status](w, "status").Listening.Ports
	if len(ports) != 1 || ports[0].Proto != "udp" || ports[0].Outer != netipAddrPort(proxy4, uint16(outer)).String() ||
		ports[0].Filtered {
		w.t.Fatalf("natpmpc got %d, status has %+v", outer, ports)
	}
	return net.UDPAddrFromAddrPort(netipAddrPort(proxy4, uint16(outer)))
}
