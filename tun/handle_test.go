package tun

import (
	"net"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// ipLink runs ip(8), or skips where it is missing.
func ipLink(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", append([]string{"-d", "link"}, args...)...).CombinedOutput()
	if err != nil {
		t.Skipf("ip link %v: %v: %s", args, err, out)
	}
	return string(out)
}

// TestHandleIsDetached: the kernel sends no frame to the handle's queue, and nothing watches the link unless it is asked to.
func TestHandleIsDetached(t *testing.T) {
	for _, watched := range []bool{false, true} {
		o := Options{MTU: 1500}
		if watched {
			o.OnLink = func() {}
		}
		d := openKernelTUN(t, true, Queues, o)
		if out := ipLink(t, "show", "dev", d.Name()); !strings.Contains(out, " numqueues 16 numdisabled 1 ") {
			t.Errorf("watched %v: want 16 queues and a detached one: %s", watched, out)
		}
		if listens := strings.Contains(stacks(), "routineNetlinkListener"); listens != watched {
			t.Errorf("the link is watched: %v, want %v", listens, watched)
		}
		d.Close()
	}
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

// TestLinkEvents: each change of the link is told, until the device is closed, and the MTU is set by it.
func TestLinkEvents(t *testing.T) {
	for _, vnet := range []bool{true, false} {
		fds := testkit.CountFiles(t)
		told := make(chan struct{}, 100)
		d := openKernelTUN(t, vnet, Queues, Options{MTU: 1300, OnLink: func() {
			select {
			case told <- struct{}{}:
			default:
			}
		}})
		if i, err := net.InterfaceByName(d.Name()); err != nil || i.MTU != 1300 {
			t.Errorf("interface %+v, %v: want an MTU of 1300", i, err)
		}
		for _, change := range [][]string{{"down"}, {"up"}, {"mtu", "1400"}, {"down"}, {"name", "vst-other"}} {
			for len(told) > 0 {
				<-told
			}
			name := d.Name()
			ipLink(t, append([]string{"set", "dev", name}, change...)...)
			select {
			case <-told:
			case <-time.After(testkit.Patience):
				t.Errorf("vnet %v: %v was not told", vnet, change)
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if n := testkit.CountFiles(t); n != fds {
			t.Errorf("vnet %v: %d open files, %d before", vnet, n, fds)
		}
		if !testkit.Until(testkit.Patience, func() bool { return !strings.Contains(stacks(), "routineNetlinkListener") }) {
			t.Fatal("the link is watched although the device is closed")
		}
	}
}
