package route

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// bindUpstream connects to nothing: what programs say arrives at far. Its BINDs wait for the test.
type bindUpstream struct {
	mu    sync.Mutex
	far   []int
	binds []*fakeBind
}

type fakeBind struct {
	ctx   context.Context
	dest  Dest
	bound func(netip.AddrPort)
	done  func(fd int, peer netip.AddrPort, err error)
}

func (u *bindUpstream) Name() string { return "proxy" }

func (u *bindUpstream) OpenPackets(_ context.Context, _ *relay.Loop, _ func([]flow.Packet), done func(relay.PacketLink, error),
	_ func(error)) {
	done(nil, socks.ReplyCommandNotSupported)
}

func (u *bindUpstream) DialStream(_ context.Context, _ *relay.Loop, _ Dest, done func(loop.Socket, error)) {
	p, err := ftpSockets()
	if err == nil {
		u.mu.Lock()
		u.far = append(u.far, p[1])
		u.mu.Unlock()
	}
	done(loop.Unwatched(p[0]), err)
}

func (u *bindUpstream) BindStream(ctx context.Context, _ *relay.Loop, d Dest, _ time.Duration, bound func(netip.AddrPort),
	done func(fd int, peer netip.AddrPort, err error)) {
	b := &fakeBind{ctx: ctx, dest: d, bound: bound}
	var once sync.Once
	b.done = func(fd int, peer netip.AddrPort, err error) { once.Do(func() { done(fd, peer, err) }) }
	context.AfterFunc(ctx, func() { b.done(-1, netip.AddrPort{}, context.Canceled) })
	u.mu.Lock()
	defer u.mu.Unlock()
	u.binds = append(u.binds, b)
}

func (u *bindUpstream) bind(t *testing.T, i int) (b *fakeBind) {
	t.Helper()
	testkit.Eventually(t, "a BIND", func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		if len(u.binds) > i {
			b = u.binds[i]
		}
		return b != nil
	})
	return b
}

// hears waits until the server has heard exactly want.
func (u *bindUpstream) hears(t *testing.T, want string) {
	t.Helper()
	got := ""
	testkit.Eventually(t, "the command "+want, func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		var b [512]byte
		if n, err := unix.Read(u.far[0], b[:]); err == nil {
			got += string(b[:n])
		}
		return len(got) >= len(want)
	})
	if got != want {
		t.Fatalf("the server hears %q, want %q", got, want)
	}
}

func ftpSockets() ([2]int, error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return [2]int{-1, -1}, err
	}
	return p, nil
}

type ftpConn struct{ peer, app netip.AddrPort }

// ftpRig is a Router with a program that is connected to 203.0.113.2:21.
func ftpRig(t *testing.T) (g *rig, u *bindUpstream, app *fakeStream, came chan ftpConn) {
	t.Helper()
	testkit.CheckLeaks(t)
	u = &bindUpstream{}
	t.Cleanup(func() {
		for _, fd := range u.far {
			_ = unix.Close(fd)
		}
	})
	g = newRig(t, Config{Upstreams: []Upstream{u}, Default: "proxy"}, nil)
	came = make(chan ftpConn, 10)
	g.SetActiveFTP(&ActiveFTP{Ports: []uint16{21}, Open: func(peer, app netip.AddrPort) flow.StreamRequest {
		came <- ftpConn{peer, app}
		return newRequest(app.String(), peer.String())
	}})
	req := newRequest("198.18.0.1:4000", "203.0.113.2:21")
	g.HandleStream(req)
	testkit.Eventually(t, "the program's connection", func() bool { _, _, app = req.outcome(); return app != nil })
	return g, u, app, came
}

const sayPort = "PORT 198,18,0,1,31,64\r\n" // 8000

var (
	ftpOuter  = netip.MustParseAddrPort("203.0.113.1:40000")
	ftpServer = netip.MustParseAddrPort("203.0.113.2:20")
)

// peerComes lets a peer connect to b.
func peerComes(t *testing.T, b *fakeBind, peer netip.AddrPort) {
	t.Helper()
	p, err := ftpSockets()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(p[1]) })
	b.done(p[0], peer, nil)
}

// The program's command waits for the BIND, names what the server reaches, and the server's connection goes to the port of
// the program. A stranger's is reset. The next command ends the BIND of the last one, and so does the end of the program.
func TestActiveFTP(t *testing.T) {
	g, u, app, came := ftpRig(t)
	app.send("SYST\r\n"+sayPort+"LIST\r\n", false)
	b := u.bind(t, 0)
	u.hears(t, "SYST\r\n")
	if b.dest.Addr.Addr() != ftpServer.Addr() {
		t.Errorf("the BIND is for %v", b.dest)
	}
	b.bound(ftpOuter)
	u.hears(t, "PORT 203,0,113,1,156,64\r\nLIST\r\n")
	peerComes(t, b, ftpServer)
	if got := <-came; got.peer != ftpServer || got.app.String() != "198.18.0.1:8000" {
		t.Errorf("a connection from %v to %v", got.peer, got.app)
	}
	app.send(sayPort, false)
	stranger := u.bind(t, 1)
	stranger.bound(ftpOuter)
	u.hears(t, "PORT 203,0,113,1,156,64\r\n")
	peerComes(t, stranger, netip.MustParseAddrPort("203.0.113.9:20"))
	testkit.Eventually(t, "the count of strangers", func() bool { return g.Stats().FTPBogus == 1 })
	app.send(sayPort, false)
	third := u.bind(t, 2)
	third.bound(ftpOuter)
	u.hears(t, "PORT 203,0,113,1,156,64\r\n") // the relay ends when everything has arrived
	app.send(sayPort, false)
	fourth := u.bind(t, 3)
	<-third.ctx.Done()
	app.Abort()
	app.l.Ready(flow.Hup)
	<-fourth.ctx.Done()
	testkit.Eventually(t, "the end of all BINDs", func() bool { return g.tcp.ftp.binds.Load() == 0 })
	if s := g.Stats(); s.FTPBound != 3 || s.FTPConnected != 1 || s.FTPRefused != 1 || len(came) != 0 {
		t.Errorf("%d bound, %d connected, %d refused", s.FTPBound, s.FTPConnected, s.FTPRefused)
	}
}

// A proxy that does not listen, and too many commands, lead to a command that the server refuses.
func TestActiveFTPRefused(t *testing.T) {
	g, u, app, _ := ftpRig(t)
	app.send(sayPort, false)
	u.bind(t, 0).done(-1, netip.AddrPort{}, socks.ReplyCommandNotSupported)
	u.hears(t, "PORT\r\n")
	testkit.Eventually(t, "the reason in the log", func() bool { return len(g.log.lines("cannot do active FTP")) == 1 })
	g.tcp.ftp.binds.Add(maxFTPBinds)
	app.send(sayPort, false)
	u.hears(t, "PORT\r\n")
	g.tcp.ftp.binds.Add(-maxFTPBinds)
	app.send("PORT 198,18,0,1,3,255\r\n", false) // below leastFTPPort
	u.hears(t, "PORT 198,18,0,1,3,255\r\n")
	if n := g.Stats().FTPRefused; n != 2 {
		t.Errorf("%d are refused", n)
	}
	app.send(sayPort, false)
	u.bind(t, 1) // it waits when the Router ends
}

// What the program sees as the source of the server's connection.
func TestActiveFTPSource(t *testing.T) {
	const v4, v6, fake = "203.0.113.2", "2001:db8::2", "198.18.4.4"
	for _, row := range []struct{ dst, name, app, peer, want string }{
		{v4, "", "198.18.0.1", v4, v4},
		{v4, "", "198.18.0.1", "::ffff:" + v4, v4},
		{v4, "", "198.18.0.1", "203.0.113.9", ""},
		{v4, "", "198.18.0.1", v6, v4}, // one server with two families
		{v6, "", "fd76:6961:736f:636b::1", v6, v6},
		{v6, "", "198.18.0.1", v6, ""},
		{fake, "ftp.example", "198.18.0.1", v4, fake},
		{fake, "ftp.example", "198.18.0.1", v6, fake},
		{fake, "ftp.example", "fd76:6961:736f:636b::1", v6, v6},
		{fake, "ftp.example", "fd76:6961:736f:636b::1", v4, ""},
		{fake, "ftp.example", "198.18.0.1", "127.0.0.1", ""},
		{v4, "", "198.18.0.1", "198.18.0.1", ""},
	} {
		c := &ftpControl{flow: flow.Flow{Dst: netip.AddrPortFrom(netip.MustParseAddr(row.dst), 21)}, dest: Dest{Name: row.name}}
		peer := netip.AddrPortFrom(netip.MustParseAddr(row.peer).Unmap(), 20)
		from, ok := c.source(netip.MustParseAddr(row.app), peer)
		if ok != (row.want != "") || ok && (from.Addr().String() != row.want || from.Port() != 20) {
			t.Errorf("%+v: %v, %v", row, from, ok)
		}
	}
	c := &ftpControl{}
	if _, ok := c.source(flow.TUN4, netip.MustParseAddrPort("203.0.113.2:0")); ok {
		t.Error("a peer has port 0")
	}
}
