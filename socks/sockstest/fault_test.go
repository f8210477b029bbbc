package sockstest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

func TestFaults(t *testing.T) {
	granted := []byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	tests := []struct {
		name string
		f    Fault
		want []byte
		err  error // how the stream ends; nil: it is kept
	}{
		{"reply", Reply(4), []byte{5, 4, 0, 1, 0, 0, 0, 0, 0, 0}, io.EOF},
		{"silence", Silence(), nil, nil},
		{"close", EarlyClose(), nil, io.EOF},
		{"reset", EarlyReset(), nil, syscall.ECONNRESET},
		{"garbage", Garbage(), Garbage().Raw, io.EOF},
		{"bad version", BadVersion(), BadVersion().Raw, nil},
		{"half", Half(3, RST), granted[:3], syscall.ECONNRESET},
		{"drip", Fault{Reply: 1, Drip: time.Millisecond}, []byte{5, 1, 0, 1, 0, 0, 0, 0, 0, 0}, io.EOF},
	}
	s := start(t, WithRedirectsOnly())
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s.SetFault(func(Request) Fault { return tt.f })
			c, err := net.Dial("tcp", s.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write([]byte{5, 1, 0})
			expect(t, c, "\x05\x00")
			// ASSOCIATE, since it is granted without a target.
			c.Write(appendAddr([]byte{5, CmdAssociate, 0}, Addr{}))
			got := make([]byte, len(tt.want))
			if _, err := io.ReadFull(c, got); err != nil {
				t.Fatal(err)
			}
			if tt.f.Cut == 0 && !bytes.Equal(got, tt.want) {
				t.Fatalf("got % x", got)
			}
			if tt.err == nil {
				c.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
				expectErr(t, c, os.ErrDeadlineExceeded)
				return
			}
			c.SetReadDeadline(time.Now().Add(testkit.Patience))
			expectErr(t, c, tt.err)
		})
	}
}

func TestAuth(t *testing.T) {
	s := start(t, WithAuth("alice", "secret"), WithRedirectsOnly())
	for pass, want := range map[string]string{"secret": "\x01\x00", "wrong": "\x01\x01"} {
		c, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte{5, 2, 0, 2})
		expect(t, c, "\x05\x02")
		c.Write(append([]byte("\x01\x05alice"), append([]byte{byte(len(pass))}, pass...)...))
		expect(t, c, want)
		c.Close()
	}
	c, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte{5, 1, 0})
	expect(t, c, "\x05\xff")
}

func TestUDPFaults(t *testing.T) {
	s := start(t, WithRedirectsOnly())
	_, _, bound := request(t, s, CmdAssociate, Addr{})
	u := udpClient(t, bound)
	w := listenUDP(t)
	at := netip.MustParseAddrPort("203.0.113.9:53")
	s.Redirect(at, unmap(w.LocalAddr()))
	send := func(dst netip.AddrPort, payload string) {
		u.Write(append([]byte{0, 0, 0}, append(appendAddr(nil, AddrFrom(dst)), payload...)...))
	}
	send(netip.MustParseAddrPort("203.0.113.10:53"), "nowhere")
	send(at, "x")
	b := make([]byte, 100)
	if n, err := w.Read(b); err != nil || string(b[:n]) != "x" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	a := s.Associations()[0]
	want := map[string]Fault{
		"\x00\x00\x00\x01\x01\x02\x03\x04\x00\x05p": {},
		"\x00\x00\x07\x01\x01\x02\x03\x04\x00\x05p": {Frag: 7},
		"\x00\x00\x00\x01\x01\x02":                  {BadUDP: true},
		"\x00\x00\x00\x01\x01\x02\x03\x04\x00\x05P": {MangleTo: func(b []byte) { b[10] = 'P' }},
	}
	for datagram, f := range want {
		a.SetFault(f)
		if err := a.Send(AddrFrom(netip.MustParseAddrPort("1.2.3.4:5")), []byte("p")); err != nil {
			t.Fatal(err)
		}
		if n, err := u.Read(b); err != nil || string(b[:n]) != datagram {
			t.Errorf("%+v: % x, %v", f, b[:n], err)
		}
	}
	a.SetFault(Fault{DropUDP: true})
	if err := a.Send(AddrFrom(at), nil); err == nil {
		t.Error("not dropped")
	}
	before := s.Stats()
	send(at, "dropped")
	if !testkit.Until(testkit.Patience, func() bool { return s.Stats().UDPDropped != before.UDPDropped }) {
		t.Fatal("not dropped")
	}
	if s.Stats().UDPUp != before.UDPUp || before.UDPUp != 1 {
		t.Errorf("before %+v, now %+v", before, s.Stats())
	}
}

// TestWithDial relays to what is no TCP.
func TestWithDial(t *testing.T) {
	near, far := net.Pipe()
	s := start(t, WithDial(func(_ context.Context, dst Addr) (net.Conn, error) {
		if dst.Name != "pipe.example" {
			return nil, syscall.EHOSTUNREACH
		}
		return near, nil
	}))
	if _, code, _ := request(t, s, CmdConnect, Addr{Name: "other.example", Port: 1}); code != 4 {
		t.Errorf("reply %d", code)
	}
	c, code, _ := request(t, s, CmdConnect, Addr{Name: "pipe.example", Port: 1})
	if code != 0 {
		t.Fatalf("reply %d", code)
	}
	c.Write([]byte("up"))
	expect(t, far, "up")
	go far.Write([]byte("down"))
	expect(t, c, "down")
	far.Close()
	expectErr(t, c, io.EOF)
}

func TestWithResolve(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s := start(t, WithResolve(func(name string) (netip.Addr, error) {
		if name != "here.example" {
			return netip.Addr{}, errors.New("no such name")
		}
		return netip.MustParseAddr("127.0.0.1"), nil
	}))
	port := unmap(ln.Addr()).Port()
	for name, want := range map[string]byte{"here.example": 0, "127.0.0.1": 0, "there.example": 1} {
		if _, code, _ := request(t, s, CmdConnect, Addr{Name: name, Port: port}); code != want {
			t.Errorf("%s: reply %d, want %d", name, code, want)
		}
	}
	if r := s.Requests(); len(r) != 3 || r[0].Dst.Port != port {
		t.Errorf("log %+v", r)
	}
}

// TestWithNetns: all sockets of the server are in another namespace, and those of this process are not.
func TestWithNetns(t *testing.T) {
	runtime.LockOSThread() // Pdeathsig follows the thread that forks
	defer runtime.UnlockOSThread()
	here, _ := os.Readlink("/proc/thread-self/ns/net")
	sleep := exec.Command("sleep", "60")
	sleep.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := sleep.Start(); err != nil {
		t.Skipf("cannot make a network namespace: %v", err)
	}
	defer func() { sleep.Process.Kill(); sleep.Wait() }()
	path := filepath.Join("/proc", strconv.Itoa(sleep.Process.Pid), "ns/net")
	s, err := Listen("tcp", "0.0.0.0:0", WithNetns(path))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(s.Addr().Port()))),
		time.Second); err == nil {
		t.Error("the server can be reached from here")
	}
	_, err = s.dialTCP(context.Background(), netip.MustParseAddrPort("192.0.2.1:9"))
	if !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("an empty namespace reaches 192.0.2.1: %v", err)
	}
	if thread, _ := os.Readlink("/proc/thread-self/ns/net"); thread != here {
		t.Errorf("this thread is in %s, not in %s", thread, here)
	}
	if _, err := Listen("tcp", "127.0.0.1:0", WithNetns("/nonexistent")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
