package socks

import (
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestPipeline: grants and refusals are understood when all was sent in one write, with and without a login.
func TestPipeline(t *testing.T) {
	for name, login := range map[string]bool{"no login": false, "login": true} {
		t.Run(name, func(t *testing.T) {
			var opts []sockstest.Option
			if login {
				opts = append(opts, sockstest.WithAuth("al", "geheim"))
			}
			d, c, srv := setup(t, Options{}, opts...)
			if login {
				s, err := c.server.WithCredentials("al", "geheim")
				if err != nil {
					t.Fatal(err)
				}
				c = d.Client(s)
			}
			far := echo(t)
			d.Tune(Tuning{Pipeline: PipelineOn})
			for range 3 {
				fetch(t, c, far)
			}
			if n := srv.Stats().Requests; n != 3 {
				t.Errorf("%d requests", n)
			}
			if _, err := connect(t, c, context.Background(), nobody); !errors.Is(err, ReplyRefused) {
				t.Error(err)
			}
		})
	}
}

// TestPipelineWords: what is sent is greeting, login and request in this order, and nothing behind it.
func TestPipelineWords(t *testing.T) {
	var h socks5
	h.start(newLogin("al", "pw"), CmdConnect, Addr{Name: "x.y", Port: 80})
	h.pipeline()
	want := "\x05\x01\x02\x01\x02al\x02pw\x05\x01\x00\x03\x03x.y\x00\x50"
	if got := string(h.Output()); got != want {
		t.Fatalf("%q", got)
	}
	sent := h.Output()
	h.Sent(len(sent))
	for _, b := range sent[:9] {
		if b != 0 {
			t.Fatalf("the password stays in memory: %q", sent)
		}
	}
	if h.Requested() || h.Output() != nil {
		t.Error("the server has not answered the greeting, and what it waits for is taken for the target's")
	}
	answer := func(b ...byte) error {
		for _, x := range b {
			in := h.Input()
			if len(in) == 0 {
				t.Fatal("it wants nothing")
			}
			in[0] = x
			if err := h.Received(1); err != nil {
				return err
			}
		}
		return nil
	}
	if err := answer(5, 2, 1, 0); err != nil || !h.Requested() || h.Answered() || h.Output() != nil {
		t.Fatal(err)
	}
	if err := answer(5, 0, 0, 1, 127, 0, 0, 1, 0, 80); err != nil || !h.Done() {
		t.Fatal(err)
	}
	h.start(newLogin("al", "pw"), CmdConnect, Addr{Name: "x.y", Port: 80})
	h.pipeline()
	h.Sent(len(h.Output()))
	if err := answer(5, 0); !errors.Is(err, ErrMalformed) {
		t.Errorf("the login would be taken for the request: %v", err)
	}
}

// TestPipelineProof: auto finds out by a connection of its own, and no flow notices what it finds.
func TestPipelineProof(t *testing.T) {
	t.Run("takes", func(t *testing.T) {
		d, c, srv := setup(t, Options{})
		far := echo(t)
		d.Tune(Tuning{Pipeline: PipelineAuto})
		fetch(t, c, far)
		testkit.Eventually(t, "it is proven", c.pipe.takes.Load)
		var seen bool
		for _, r := range srv.Requests() {
			seen = seen || r.Dst.Port == nobody.Port
		}
		if !seen {
			t.Error("no flow may be the proof")
		}
		fetch(t, c, far)
		c.Renew()
		if c.pipe.takes.Load() {
			t.Error("another network may have another server")
		}
		testkit.Eventually(t, "it is quiet", pooledIs(d, 0))
	})
	t.Run("loses", func(t *testing.T) {
		d, c, _ := setup(t, Options{HandshakeTimeout: 300 * time.Millisecond}, sockstest.WithLostReads())
		far := echo(t)
		d.Tune(Tuning{Pipeline: PipelineAuto})
		for range 3 {
			fetch(t, c, far)
		}
		testkit.Eventually(t, "the proof is over", func() bool { return !c.pipe.asking.Load() })
		fetch(t, c, far)
		if c.pipe.takes.Load() {
			t.Error("the server lost the request of the proof, and is trusted")
		}
		testkit.Eventually(t, "it is quiet", pooledIs(d, 0))
		// The test can fail: such a server answers nothing to all in one write.
		d.Tune(Tuning{Pipeline: PipelineOn})
		if _, err := connect(t, c, context.Background(), AddrFrom(far)); !errors.Is(err, ErrSilent) {
			t.Errorf("%v", err)
		}
	})
}

func TestPipelineProofTells(t *testing.T) {
	fault := func(op string, err error) error { return &ServerError{Server: "x", Op: op, Err: err} }
	for _, c := range []struct {
		err         error
		takes, told bool
	}{
		{nil, true, true}, {ReplyRefused, true, true}, {ReplyNotAllowed, true, true},
		{ErrSilent, false, true}, {ErrEnded, false, true}, {fault(OpHandshake, errEOF), false, true},
		{fault(OpAuthenticate, ErrCredentials), false, true},
		{fault(OpConnect, unix.ECONNREFUSED), false, false}, {fault(OpHandshake, os.ErrDeadlineExceeded), false, false},
		{ErrClosed, false, false},
	} {
		if takes, told := pipelineProof(c.err); takes != c.takes || told != c.told {
			t.Errorf("%v: takes %v, told %v", c.err, takes, told)
		}
	}
}

// TestFastOpen: in a network namespace whose kernel sends data in a SYN without a cookie, and takes it, a handshake works, and a
// server that is not there is a failure to connect.
func TestFastOpen(t *testing.T) {
	runtime.LockOSThread() // for ever: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		t.Skipf("cannot make a network namespace: %v", err)
	}
	// 1, 2, 4, 0x200 and 0x400 of the kernel's ip-sysctl.rst.
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte("1543"), 0); err != nil {
		t.Skipf("cannot set the sysctl: %v", err)
	}
	upLoopback(t)
	srv, err := sockstest.Listen("tcp", "127.0.0.1:1080", sockstest.WithRedirectsOnly())
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	d, err := NewDialer(Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d.Tune(Tuning{FastOpen: true, Pipeline: PipelineOn})
	ask := func(url string) (got error) {
		t.Helper()
		over := false
		d.Client(mustServer(t, url)).
			Connect(context.Background(), l, Addr{Name: "x.y", Port: 80}, func(s loop.Socket, err error) {
				got, over = err, true
				s.Close()
			})
		for end := time.Now().Add(testkit.Patience); !over; {
			if _, err := l.Step(true); err != nil || time.Now().After(end) {
				t.Fatal(err, "done is not called")
			}
		}
		return got
	}
	for range 2 {
		if err := ask("socks5://127.0.0.1:1080"); !errors.Is(err, ReplyHostUnreachable) { // it reaches nothing
			t.Error(err)
		}
	}
	if n := synData(t); n == 0 {
		t.Error("no SYN had data")
	}
	var fault *ServerError
	if err := ask("socks5://127.0.0.1:1"); !errors.As(err, &fault) || fault.Op != OpConnect ||
		!errors.Is(err, unix.ECONNREFUSED) {
		t.Error(err)
	}
}

// upLoopback sets lo up in the thread's namespace.
func upLoopback(t *testing.T) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	r.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r); err != nil {
		t.Fatal(err)
	}
}

// synData is how many SYNs with data the kernel of the thread's namespace has taken (TCPFastOpenPassive).
func synData(t *testing.T) int {
	b, err := os.ReadFile("/proc/thread-self/net/netstat")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	i := slices.Index(strings.Fields(lines[0]), "TCPFastOpenPassive")
	if i < 0 {
		t.Fatal("the kernel does not count it")
	}
	n, err := strconv.Atoi(strings.Fields(lines[1])[i])
	if err != nil {
		t.Fatal(err)
	}
	return n
}
