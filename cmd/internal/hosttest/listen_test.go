package hosttest

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/testkit"
)

// peerPort is where programs of the host listen for peers.
const peerPort = 6881

// binding starts dante in the proxy namespace, which lets peers in by BIND.
func (w *world) binding() {
	w.t.Helper()
	dir := w.t.TempDir()
	conf := filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, []byte(`logoutput: stderr
internal: `+proxy4+` port = 1080
external: `+proxy4+`
clientmethod: none
socksmethod: none
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 command: connect bind udpassociate }
socks pass { from: 0/0 to: 0/0 command: bindreply udpreply }
`), 0o600); err != nil {
		w.t.Fatal(err)
	}
	if _, err := exec.LookPath("danted"); err != nil {
		w.t.Skip("danted is not installed (scripts/deps.sh)")
	}
	w.start("proxy", nil, nil, "danted", "-p", filepath.Join(dir, "pid"), "-f", conf)
	w.eventually(20*time.Second, "dante answers", func() bool {
		c, err := w.dial("proxy", netipAddrPort(proxy4, 1080))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// to tells the recorder that the host may talk to the proxy at that TCP endpoint.
func (r *recorder) to(at netip.AddrPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.proxyTCP[at] = true
}

// outer waits until peers can reach the host's port, not at the endpoint that was used last, and returns where.
func (w *world) outer(not string) (at string) {
	w.t.Helper()
	w.eventually(20*time.Second, "a BIND that waits", func() bool {
		l := ask[control.Status](w, "status").Listening
		if l == nil || len(l.Ports) == 0 {
			return false
		}
		at = l.Ports[0].Outer
		return at != "" && at != not
	})
	if at == "" {
		w.t.FailNow()
	}
	return at
}

// peer connects from an address of the world to where peers reach the host. A port that has just been used is shown until
// the next BIND.
func (w *world) peer(from string) (c *net.TCPConn) {
	w.t.Helper()
	w.eventually(20*time.Second, "a peer to connect", func() bool {
		to := netip.MustParseAddrPort(w.outer(""))
		got, err := w.from(from, to.Addr().String(), to.Port())
		if err == nil {
			c = got.(*net.TCPConn)
		}
		return err == nil
	})
	if c == nil {
		w.t.FailNow()
	}
	return c
}

// acceptFrom waits for the connection of a peer, which must have the peer's address.
func (w *world) acceptFrom(l net.Listener, from net.Conn) (c *net.TCPConn) {
	w.t.Helper()
	_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
	got, err := l.Accept()
	if err != nil {
		w.t.Fatalf("the program accepts nothing: %v", err)
	}
	w.t.Cleanup(func() { got.Close() })
	seen, want := netip.MustParseAddrPort(got.RemoteAddr().String()), netip.MustParseAddrPort(from.LocalAddr().String())
	if seen = netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port()); seen != want {
		w.t.Errorf("the program sees a connection from %v, want %v", seen, want)
	}
	return got.(*net.TCPConn)
}

// sendBoth sends 1 MB each way and ends each direction in order.
func (w *world) sendBoth(a, b *net.TCPConn) {
	w.t.Helper()
	for _, way := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		sent := make(chan error, 1)
		go func() {
			_, err := way[0].Write(make([]byte, 1<<20))
			_ = way[0].CloseWrite()
			sent <- err
		}()
		_ = way[1].SetDeadline(time.Now().Add(20 * time.Second))
		if n, err := io.Copy(io.Discard, way[1]); err != nil || n != 1<<20 {
			w.t.Fatalf("%d bytes arrived: %v", n, err)
		}
		if err := <-sent; err != nil {
			w.t.Fatal(err)
		}
	}
}

// nothingLeft fails the test if the recorder has seen anything.
func (r *recorder) nothingLeft(t *testing.T, when string) {
	t.Helper()
	for _, s := range r.take() {
		t.Errorf("%s: this left the host: %+v", when, s)
	}
}

// listenCases are hosts on which a peer is to reach a program.
var listenCases = []struct {
	name  string
	flags []string
	host  func(w *world)
}{
	{"plain", nil, func(*world) {}},
	{"rp_filter=1", nil, func(w *world) {
		w.sysctl("host", map[string]string{
			"net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/default/rp_filter": "1", "net/ipv4/conf/eth0/rp_filter": "1",
		})
	}},
	// The answers to a peer must not go past the proxy, whatever is excluded.
	{"excluded", []string{"--exclude", "203.0.113.0/24", "--exclude-uid", "0", "--exclude-port", "30000-65535"}, func(*world) {}},
	{"excluded, rp_filter=1", []string{"--exclude", "203.0.113.0/24"}, func(w *world) {
		w.sysctl("host", map[string]string{"net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/default/rp_filter": "1"})
	}},
	{"included", []string{"--include-uid", "1000"}, func(*world) {}},
	{"direct by rule", []string{"--rule", "dst 203.0.113.0/24 direct"}, func(*world) {}},
	{"strict", []string{"--strict"}, func(*world) {}},
	{"a firewall that lets the port in", nil, func(w *world) {
		w.nft("host", `table inet firewall { chain input { type filter hook input priority 0; policy drop;
	iifname lo accept; ct state established,related accept; iifname "viasocks0" tcp dport 6881 accept; icmpv6 type != 0 accept
}
}`)
	}},
}

// TestListen: a peer that only connects inwards reaches a program of the host through dante, from its own address, and
// both directions end in order; it is reset while nobody listens. Nothing leaves the host but to the proxy, and the stop
// restores everything.
func TestListen(t *testing.T) {
	t.Parallel()
	for _, tt := range listenCases {
		t.Run(tt.name, func(t *testing.T) {
			if !apart(t) {
				return
			}
			w := newWorld(t)
			w.binding()
			tt.host(w)
			before := w.state()
			flags := []string{"--proxy", "socks5://" + proxy4, "--listen", fmt.Sprint(peerPort)}
			rec := newRecorder(w)
			rec.to(netipAddrPort(proxy4, 1080))
			d := w.up(append(flags, tt.flags...)...)
			want := fmt.Sprintf("%s:%d", proxy4, peerPort)
			at := w.outer("")
			if at != want {
				t.Errorf("peers reach the host at %s, want %s", at, want)
			}
			refused := w.peer("203.0.113.201") // nobody listens yet
			_ = refused.SetDeadline(time.Now().Add(20 * time.Second))
			if n, err := refused.Read(make([]byte, 1)); err == nil {
				t.Errorf("the peer reads %d bytes from a program that does not listen", n)
			}
			w.eventually(20*time.Second, "the count of refused peers", func() bool {
				return ask[control.Status](w, "status").Listening.Refused == 1
			})
			l := w.listen("host", fmt.Sprintf(":%d", peerPort))
			for i := range 3 {
				far := w.peer(fmt.Sprintf("203.0.113.%d", 202+i))
				w.sendBoth(w.acceptFrom(l, far), far)
			}
			if err := d.stop(); err != nil {
				t.Error(err)
			}
			rec.nothingLeft(t, "up")
			l.Close()
			w.same("after the stop", before, w.state())
		})
	}
}

// TestListenIPv6: a peer that reaches the proxy by IPv6 comes to the host's own IPv6 address.
func TestListenIPv6(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	rec := newRecorder(w)
	s := w.proxy("[" + proxy6 + "]:1080")
	rec.known(s)
	d := w.up("--proxy", s.URL(), "--listen", fmt.Sprint(peerPort))
	l := w.listen("host", fmt.Sprintf(":%d", peerPort))
	far := w.peer(client6)
	near := w.acceptFrom(l, far)
	if got := netip.MustParseAddrPort(near.LocalAddr().String()).Addr().String(); got != host6 {
		t.Errorf("the program is reached at %s, want %s", got, host6)
	}
	w.sendBoth(far, near)
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "IPv6")
}

// portsAre waits until the status names exactly these ports, each as "PORT at ENDPOINT;".
func (w *world) portsAre(want string) {
	w.t.Helper()
	var got string
	w.eventually(20*time.Second, "the ports "+want, func() bool {
		got = ""
		if l := ask[control.Status](w, "status").Listening; l != nil {
			for _, p := range l.Ports {
				got += fmt.Sprintf("%d at %s;", p.Port, p.Outer)
			}
		}
		return got == want
	})
	if got != want {
		w.t.Errorf("the ports are %s, want %s", got, want)
	}
}

// TestListenReload: SIGHUP adds and removes ports, and disturbs neither another port nor an open connection. When the
// host's address changes, the next peer comes to the new one.
func TestListenReload(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.binding()
	conf := "proxy socks5://" + proxy4 + "\n"
	w.configure(conf)
	d := w.up("--config", configFile)
	if s := ask[control.Status](w, "status"); s.Listening != nil {
		t.Errorf("%+v", s.Listening)
	}
	w.configure(conf + "listen 6881\n")
	d.reload()
	w.portsAre("6881 at 192.0.2.2:6881;")
	l := w.listen("host", ":6881")
	far := w.peer("203.0.113.201")
	w.acceptFrom(l, far)
	w.configure(conf + "listen 6882\nlisten 6883\n")
	d.reload()
	w.portsAre("6882 at 192.0.2.2:6882;6883 at 192.0.2.2:6883;")
	w.configure(conf + "listen 6883\nforwarded-port 7000\n")
	d.reload()
	w.portsAre("6883 at 192.0.2.2:6883;")
	l2 := w.listen("host", ":6883")
	w.ip("host", "addr add 198.51.100.3/24 dev eth0\nroute replace default via "+router4+" dev eth0 src 198.51.100.3\n"+
		"addr del "+host4+"/24 dev eth0\naddr replace 198.51.100.3/24 dev eth0\n"+
		"route replace default via "+router4+" dev eth0 src 198.51.100.3")
	w.eventually(
		20*time.Second,
		"the TUN's route to follow",
		func() bool { return strings.Contains(w.tableT(), "src 198.51.100.3") },
	)
	w.eventually(20*time.Second, "the network change is taken", func() bool {
		return strings.Contains(d.log.String(), "the network changed")
	})
	// dante did not hear of the end of the BIND by the old address, and holds its port.
	w.outer("192.0.2.2:6883")
	far2 := w.peer("203.0.113.202")
	near2 := w.acceptFrom(l2, far2)
	if got := near2.LocalAddr().String(); got != "198.51.100.3:6883" {
		t.Errorf("the peer came to %s", got)
	}
	w.sendBoth(far2, near2)
	w.configure(conf)
	d.reload()
	w.eventually(20*time.Second, "no port", func() bool { return ask[control.Status](w, "status").Listening == nil })
	if warnings := ask[control.Status](w, "status").Warnings; len(warnings) > 0 {
		t.Errorf("%q", warnings)
	}
}

// TestListenKilled: a connection of a peer is open when viasocks is killed. What the program goes on sending leaves the
// host neither then, nor after a restart, nor after the stop: it did not come from outside.
func TestListenKilled(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.binding()
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	rules := w.ipRules()
	flags := []string{"--proxy", "socks5://" + proxy4, "--listen", fmt.Sprint(peerPort)}
	d := w.up(flags...)
	l := w.listen("host", fmt.Sprintf(":%d", peerPort))
	var open []*net.TCPConn
	for i := range 4 {
		far := w.peer(fmt.Sprintf("203.0.113.%d", 210+i))
		near := w.acceptFrom(l, far)
		go func() { _, _ = io.Copy(far, far) }()
		if err := ping(near); err != nil {
			t.Fatal(err)
		}
		open = append(open, near)
	}
	speak := func() {
		for _, c := range open {
			_, _ = c.Write([]byte("is anybody there?"))
		}
	}
	d.kill()
	speak()
	testkit.Pace(1500 * time.Millisecond) // for retransmissions
	w.run("host", nil, "conntrack", "-F")
	speak()
	rec.nothingLeft(t, "killed")
	next := w.up(flags[:2]...) // without --listen
	speak()
	testkit.Pace(time.Second)
	rec.nothingLeft(t, "restarted")
	if err := next.stop(); err != nil {
		t.Error(err)
	}
	testkit.Pace(3 * time.Second)
	rec.nothingLeft(t, "stopped")
	w.cleared(rules)
}

// TestListenTakeover: connections of peers survive a takeover, and the new viasocks listens at the same port.
func TestListenTakeover(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.binding()
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	flags := []string{"--proxy", "socks5://" + proxy4, "--listen", fmt.Sprint(peerPort)}
	first := w.up(flags...)
	l := w.listen("host", fmt.Sprintf(":%d", peerPort))
	far := w.peer("203.0.113.201")
	near := w.acceptFrom(l, far)
	go func() { _, _ = io.Copy(near, near) }()
	if err := ping(far); err != nil {
		t.Fatal(err)
	}
	second := w.takeOver(first, flags...)
	if err := ping(far); err != nil {
		t.Errorf("the connection of before: %v", err)
	}
	far2 := w.peer("203.0.113.202")
	near2 := w.acceptFrom(l, far2)
	w.sendBoth(far2, near2)
	if err := ping(far); err != nil {
		t.Errorf("the connection of before: %v", err)
	}
	far.Close()
	near.Close()
	if err := first.wait(); err != nil {
		t.Errorf("the first ended with %v", err)
	}
	if err := second.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "takeover")
}

// A port that docker publishes reaches its container, which sees the peer's address, too.
func TestListenPublished(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.binding()
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	l := w.listen("ctr", ":80")
	d := w.up("--proxy", "socks5://"+proxy4, "--listen", fmt.Sprint(publishedPort))
	far := w.peer("203.0.113.201")
	w.sendBoth(far, w.acceptFrom(l, far))
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "published")
}

// A program that is bound to 127.0.0.1, and a firewall that drops what comes in, are not reached by a peer.
func TestListenUnreachable(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	s := w.proxy(proxy4 + ":1080")
	d := w.up("--proxy", s.URL(), "--listen", fmt.Sprint(peerPort))
	w.listen("host", fmt.Sprintf("127.0.0.1:%d", peerPort))
	reset := func(what string) {
		t.Helper()
		began := time.Now()
		far := w.peer("203.0.113.201")
		_ = far.SetDeadline(time.Now().Add(30 * time.Second))
		if n, err := far.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: the peer reads %d bytes: %v", what, n, err)
		}
		t.Logf("%s: reset after %v", what, time.Since(began).Round(time.Millisecond))
	}
	reset("bound to 127.0.0.1")
	w.nft("host", "table inet firewall { chain input { type filter hook input priority 0; policy drop;\n"+
		"iifname lo accept; ct state established,related accept\n}\n}")
	reset("a firewall that drops")
	if err := d.stop(); err != nil {
		t.Error(err)
	}
}
