package hosttest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// keeperOf finds the process that attach has in the namespace; 0: there is none yet.
func keeperOf(pid int) int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		b, _ := os.ReadFile(list)
		for _, child := range strings.Fields(string(b)) {
			cmd, _ := os.ReadFile("/proc/" + child + "/cmdline")
			if n, err := strconv.Atoi(child); err == nil && bytes.Contains(cmd, []byte("viasocks-keeper")) {
				return n
			}
		}
	}
	return 0
}

// shoot connects from the container to the world until the test ends or stop is called.
func (w *world) shoot() (stop func()) {
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		_ = in("ctr", func() error {
			for i := 0; ; i++ {
				select {
				case <-end:
					return nil
				default:
				}
				testkit.Pace(2 * time.Millisecond)
				to := "203.0.113.7:77"
				if i%2 == 0 {
					to = "[2001:db8:f::7]:77"
				}
				if c, err := net.DialTimeout("tcp", to, 50*time.Millisecond); err == nil {
					c.Close()
				}
				if c, err := net.Dial("udp", "203.0.113.9:53"); err == nil {
					_, _ = c.Write([]byte("leak"))
					c.Close()
				}
			}
		})
	}()
	var over bool
	stop = func() {
		if !over {
			over = true
			close(end)
			<-done
		}
	}
	w.t.Cleanup(stop)
	return stop
}

// closedInside reports whether the filter is in the container's namespace.
func (w *world) closedInside() bool {
	w.t.Helper()
	return strings.Contains(w.run("ctr", nil, "nft", "list", "tables"), "viasocks")
}

// killInstants is how many instants of a life each process is killed at.
const killInstants = 20

// unreached is how long a closed namespace is seen not to reach the world. While the TUN takes the packets that nobody reads,
// connect() waits for all of it; a packet that leaves is answered within a millisecond. At the last instant it is longer:
// when attach was killed, longer than the TUN takes them.
const unreached = 250 * time.Millisecond

// TestAttachKilled: whichever process is killed, and whenever, nothing leaves a namespace that was steered, and it can be
// given back or taken over.
func TestAttachKilled(t *testing.T) {
	t.Parallel()
	for _, victim := range []string{"attach", "keeper"} {
		t.Run(victim, func(t *testing.T) {
			if apart(t) {
				testAttachKilled(t, victim)
			}
		})
	}
}

func testAttachKilled(t *testing.T, victim string) {
	testkit.CheckLeaks(t)
	w, rec, _ := container(t)
	before := w.stateOf("ctr")
	d := w.attach("--netns", "ctr")
	d.ready()
	life := d.startedIn * 2
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	var closed, ready int
	for i := range killInstants {
		after := life * time.Duration(i) / killInstants
		t.Run(fmt.Sprintf("%d of %d", i+1, killInstants), func(t *testing.T) {
			d := w.attach("--netns", "ctr")
			stop := w.shoot()
			until := d.started.Add(after)
			if i >= killInstants/2 { // a start may take longer than the measured one: half of the instants are after its end
				d.ready()
				until = time.Now().Add(after - life/2)
			}
			w.waitUntil(until, func() {
				if strings.Contains(d.log.String(), "msg=ready") && ready <= i {
					rec.take() // from here on nothing may leave
					ready = i + 1
				}
			})
			wasReady := ready == i+1
			pid := d.cmd.Process.Pid
			if k := keeperOf(pid); victim == "keeper" && k != 0 {
				pid = k
			}
			_ = syscall.Kill(pid, syscall.SIGKILL)
			_ = d.wait() // it ends by itself when the keeper was killed
			w.keeperGone()
			shut := w.closedInside()
			if shut && !wasReady {
				rec.take() // while it is open, frames keep coming
			}
			if wasReady && !shut {
				t.Errorf("after %v: it was ready and the namespace is open", after)
			}
			if shut {
				closed++
				patience := unreached
				if i == killInstants-1 {
					patience = map[string]time.Duration{"attach": guard, "keeper": guard / 2}[victim]
				}
				if err := w.outgoingWithin("203.0.113.7", patience); err == nil {
					t.Errorf("after %v: the container reaches the world", after)
				}
				for _, s := range rec.take() {
					t.Errorf("after %v: this left the host: %+v", after, s)
				}
			}
			stop()
			if err := w.attachedPort(host4); err != nil {
				t.Errorf("after %v: the published port: %v", after, err)
			}
			w.giveBack(i%2 == 0)
			w.restored(fmt.Sprintf("killed after %v", after), "ctr", before)
			if err := w.outgoing("203.0.113.7"); err != nil {
				t.Errorf("after %v and given back: %v", after, err)
			}
			rec.take()
		})
	}
	if closed < killInstants/3 {
		t.Errorf("the namespace was closed at %d of %d instants only: the test proves little", closed, killInstants)
	}
	t.Logf("closed at %d of %d instants", closed, killInstants)
}

// waitUntil waits until a time, and calls look meanwhile.
func (w *world) waitUntil(end time.Time, look func()) {
	for look(); time.Now().Before(end); look() {
		testkit.Pace(min(2*time.Millisecond, time.Until(end)))
	}
}

// keeperGone waits until no keeper is left: it ends when attach is gone.
func (w *world) keeperGone() {
	w.t.Helper()
	w.eventually(30*time.Second, "the keeper ends", func() bool {
		all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, name := range all {
			if b, _ := os.ReadFile(name); bytes.Contains(b, []byte("viasocks-keeper")) {
				return false
			}
		}
		return true
	})
}

// giveBack undoes what was left, by `down` or by another attach that takes over and stops.
func (w *world) giveBack(byDown bool) {
	w.t.Helper()
	if byDown {
		if out, err := w.command("down", "--netns", "ctr"); err != nil {
			w.t.Errorf("down: %v\n%s", err, out)
		}
		return
	}
	d := w.attach("--netns", "ctr")
	d.ready()
	if err := w.outgoing("203.0.113.7"); err != nil {
		w.t.Error("after another one took over: ", err)
	}
	if err := d.stop(); err != nil {
		w.t.Errorf("the one that took over ended with %v\n%s", err, d.log)
	}
}

// stateFiles lists the directory of viasocks.
func stateFiles() (paths []string) {
	paths, _ = filepath.Glob("/run/viasocks/*")
	return paths
}

// TestAttachedIsKilled: whenever the only program of a network is killed, attach ends and says why, and neither a keeper nor a
// file is left.
func TestAttachedIsKilled(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, rec, _ := container(t)
	before, there := w.state(), stateFiles() // another test may have ended badly
	var life time.Duration
	ready := 0
	for i := range killInstants {
		pid, end := w.alone(0, "--net")
		w.run("", nil, "ip", "netns", "del", "alone") // the name would keep the network
		d := w.attach("--pid", strconv.Itoa(pid))
		if i == 0 {
			d.ready()
			life = 2 * d.startedIn
		}
		if i < killInstants/2 {
			testkit.Pace(life * time.Duration(i) / killInstants)
		} else { // a start may take longer than the measured one
			d.ready()
			testkit.Pace(life * time.Duration(i-killInstants/2) / killInstants)
		}
		end()
		var exit *exec.ExitError
		if err := d.wait(); !errors.As(err, &exit) {
			t.Errorf("instant %d: it ended with %v", i, err)
		} else if code := exit.ExitCode(); strings.Contains(d.log.String(), "msg=ready") {
			ready++
			if code != 4 {
				t.Errorf("instant %d: it was ready and ended with %d, not 4\n%s", i, code, d.log)
			}
		} else if code != 1 && code != 4 {
			t.Errorf("instant %d: it ended with %d\n%s", i, code, d.log)
		}
		w.keeperGone()
		for _, left := range stateFiles() {
			if !slices.Contains(there, left) {
				t.Errorf("instant %d: this file is left: %s", i, left)
			}
		}
	}
	if ready < killInstants/2 {
		t.Errorf("it was ready at %d of %d instants only", ready, killInstants)
	}
	w.same("after all", before, w.state())
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
}
