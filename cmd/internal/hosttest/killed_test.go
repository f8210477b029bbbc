package hosttest

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// attempt is a connect() of a program.
type attempt struct {
	to     netip.AddrPort
	began  time.Duration // since the attempts began
	took   time.Duration
	err    error
	socket int
}

func (a *attempt) String() string {
	return fmt.Sprintf("connect(%s) %.2f s after the start: %v after %.2f s", a.to, a.began.Seconds(), a.err, a.took.Seconds())
}

// attempts connects in the host namespace every 20 ms until stop, and gives how the attempts ended.
func (w *world) attempts() (stop func() []*attempt) {
	end := make(chan struct{})
	result := make(chan []*attempt, 1)
	go func() {
		var all []*attempt
		_ = in("host", func() error {
			all = connectUntil(end)
			return nil
		})
		result <- all
	}()
	return sync.OnceValue(func() []*attempt {
		close(end)
		return <-result
	})
}

// attemptsMost is how long the last attempts may take.
const attemptsMost = 20 * time.Second

func connectUntil(end chan struct{}) (all []*attempt) {
	start := time.Now()
	var last time.Time
	for open := 1; open > 0; {
		select {
		case <-end:
			if last.IsZero() {
				last = time.Now()
			}
		default:
			to := netipAddrPort("203.0.113.7", 77)
			if len(all)%2 == 1 {
				to = netipAddrPort("2001:db8:f::7", 77)
			}
			all = append(all, tryConnect(to, time.Since(start)))
		}
		open = 0
		for _, a := range all {
			a.look(start)
			if a.socket >= 0 {
				open++
			}
		}
		if open > 0 && !last.IsZero() && time.Since(last) > attemptsMost {
			break
		}
		if last.IsZero() {
			open++
		}
		testkit.Pace(20 * time.Millisecond)
	}
	for _, a := range all {
		if a.socket >= 0 {
			a.ended(start, unix.EINPROGRESS)
		}
	}
	return all
}

func tryConnect(to netip.AddrPort, began time.Duration) *attempt {
	a := &attempt{to: to, began: began, socket: -1}
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	if a.socket, a.err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); a.err != nil {
		return a
	}
	if err := unix.Connect(a.socket, sockaddr(to)); err != unix.EINPROGRESS {
		unix.Close(a.socket)
		a.socket, a.err = -1, err
	}
	return a
}

// look notes the end of an attempt.
func (a *attempt) look(start time.Time) {
	if a.socket < 0 {
		return
	}
	p := []unix.PollFd{{Fd: int32(a.socket), Events: unix.POLLOUT}}
	if n, _ := unix.Poll(p, 0); n <= 0 {
		return
	}
	n, err := unix.GetsockoptInt(a.socket, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	a.ended(start, err)
}

func (a *attempt) ended(start time.Time, err error) {
	unix.Close(a.socket)
	a.socket, a.err, a.took = -1, err, time.Since(start)-a.began
}

// noneLost checks that every attempt ended with a connection.
func noneLost(t *testing.T, when string, all []*attempt) {
	t.Helper()
	var lost int
	for _, a := range all {
		if a.err == nil {
			continue
		}
		if lost++; lost <= 5 {
			t.Errorf("%s: %v", when, a)
		}
	}
	t.Logf("%s: %d attempts to connect, %d lost", when, len(all), lost)
}

// watchedWorld is a world with a proxy and a far end that echoes.
func watchedWorld(t *testing.T) (*world, *recorder) {
	t.Helper()
	w := newWorld(t)
	w.hostServers()
	serve(w.listen("world", ":77"), echo)
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	return w, w.watched("eth0")
}

const (
	// restartAfter is how long systemd waits before it starts viasocks.service again (RestartSec).
	restartAfter = time.Second
	// swallowed is how long the TUN surely takes packets that nobody reads, with some time to spare.
	swallowed = 7 * time.Second
)

// TestRestartUnnoticed: programs do not notice that viasocks is killed and started again as systemd does it. What they send
// meanwhile vanishes, and is sent again, also right before the new one steers. One that cannot start leaves no such wait.
func TestRestartUnnoticed(t *testing.T) {
	if !apart(t) {
		return
	}
	w, rec := watchedWorld(t)
	d := w.up("--proxy", proxyURL)
	rec.take()
	for good, tries := 0, 0; good < 3 && tries < 10; tries++ {
		stop := w.attempts()
		testkit.Pace(100 * time.Millisecond)
		d.kill()
		killed := time.Now()
		testkit.Pace(restartAfter)
		d = w.up("--proxy", proxyURL)
		took := time.Since(killed)
		testkit.Pace(100 * time.Millisecond)
		all := stop()
		if took > swallowed {
			t.Logf("the machine is slow: ready after %v", took)
			continue
		}
		good++
		noneLost(t, fmt.Sprintf("killed, and ready after %v", took), all)
	}
	d.kill()
	rec.mu.Lock()
	rec.proxyTCP[netipAddrPort(proxy4, 1)] = true
	rec.mu.Unlock()
	if err := w.launch("--proxy", "socks5://"+proxy4+":1").wait(); err == nil {
		t.Error("up started without its proxy")
	}
	w.errorsAtOnce("killed, and then a start that failed")
	rec.noLeak(w, "killed")
	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
}

// TestStalled: a viasocks that does not run for some seconds, as when the host swaps, loses nothing.
func TestStalled(t *testing.T) {
	if !apart(t) {
		return
	}
	w, rec := watchedWorld(t)
	d := w.up("--proxy", proxyURL)
	rec.take()
	var held []net.Conn
	for _, to := range []string{"203.0.113.7", "2001:db8:f::7"} {
		c, err := w.dial("host", netipAddrPort(to, 77))
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	stop := w.attempts()
	d.signal(syscall.SIGSTOP)
	for range 10 {
		for _, c := range held { // which is sent again and again
			if _, err := c.Write([]byte("x")); err != nil {
				t.Errorf("%v: %v", c.RemoteAddr(), err)
			}
		}
		testkit.Pace(500 * time.Millisecond)
	}
	d.signal(syscall.SIGCONT)
	noneLost(t, "stalled", stop())
	for _, c := range held {
		_ = c.SetDeadline(time.Now().Add(testkit.Patience))
		if _, err := io.ReadFull(c, make([]byte, 10)); err != nil {
			t.Errorf("a connection that was there before: %v: %v", c.RemoteAddr(), err)
		}
	}
	rec.noLeak(w, "stalled")
	if err := d.stop(); err != nil {
		t.Error(err)
	}
}
