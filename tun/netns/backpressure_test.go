package netns

import (
	"errors"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var realDriver = driver

// onDriver has the kernel's TUN driver offer features, and say of each interface that it has the flags inForce besides its own.
// The flags that TUNSETIFF is asked for are added to asked; the real driver ignores those that it does not know.
func onDriver(t *testing.T, features uint32, err error, inForce uint16, asked *[]uint16) {
	t.Helper()
	t.Cleanup(func() { driver = realDriver })
	driver.features = func(int) (uint32, error) { return features, err }
	driver.attach = func(fd int, ifr *unix.Ifreq) error {
		*asked = append(*asked, ifr.Uint16())
		return realDriver.attach(fd, ifr)
	}
	driver.flags = func(fd int, ifr *unix.Ifreq) error {
		if err := realDriver.flags(fd, ifr); err != nil {
			return err
		}
		ifr.SetUint16(ifr.Uint16() | inForce)
		return nil
	}
}

// TestBackpressureIsAskedFor: the flag goes to TUNSETIFF where TUNGETFEATURES has it, and nowhere else. No other flag comes with
// it.
func TestBackpressureIsAskedFor(t *testing.T) {
	network(t)
	const usual = unix.IFF_TUN | unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE | unix.IFF_NAPI
	const plain = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE
	for _, c := range []struct {
		name     string
		features uint32
		err      error
		want     uint16
	}{
		{"offered", usual | 0x80, nil, plain | 0x80},
		{"not offered", usual, nil, plain},
		{"everything else is", ^uint32(0x80), nil, plain},
		{"above the 16 bits of TUNSETIFF", usual | 0x80<<16, nil, plain},
		{"not told", 0, unix.ENOTTY, plain},
		{"not told, with a word", 0x80, errors.New("no"), plain},
	} {
		var asked []uint16
		t.Run(c.name, func(t *testing.T) {
			onDriver(t, c.features, c.err, 0, &asked)
			queues, _, err := OpenTUN(TUNOptions{Name: "vsb%d", VnetHdr: true, Queues: 2})
			if err != nil {
				t.Fatal(err)
			}
			CloseTUN(queues)
			if len(asked) != 2 || asked[0] != c.want || asked[1] != c.want {
				t.Errorf("TUNSETIFF was asked for %#x, want %#x", asked, c.want)
			}
		})
	}
	// What this kernel says is not an error, whatever it has.
	fd, name, err := openQueue("", unix.IFF_TUN|unix.IFF_NO_PI)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if features, err := driver.features(fd); err != nil || features&unix.IFF_TUN == 0 {
		t.Errorf("features %#x, %v", features, err)
	}
	if has, offer := hasBackpressure(fd), offered(fd) != 0; has != offer {
		t.Errorf("%s has backpressure: %v, and the kernel offers it: %v", name, has, offer)
	}
}

// TestQueueingDiscipline: there is none without backpressure. With it, each queue has the kernel's default, also on an interface
// that was left without one.
func TestQueueingDiscipline(t *testing.T) {
	network(t)
	if _, err := exec.LookPath("tc"); err != nil {
		t.Skip(err)
	}
	const fifos = "qdisc mq"
	for _, c := range []struct {
		name    string
		inForce uint16 // beside the offer
		before  uint16 // of a run before, which left the interface; 0xffff: there was none
		want    string
	}{
		{"without", 0, 0xffff, "qdisc noqueue"},
		{"with", iffBackpressure, 0xffff, fifos},
		{"with, left by one without", iffBackpressure, 0, fifos},
		{"without, left by one with", 0, iffBackpressure, "qdisc noqueue"},
		{"with, left by one with", iffBackpressure, iffBackpressure, fifos},
		{"another flag in force", unix.IFF_NO_CARRIER, 0xffff, "qdisc noqueue"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked []uint16
			name := "vsb%d"
			defer func() { exec.Command("ip", "link", "del", name).Run() }()
			open := func(inForce uint16) {
				t.Helper()
				onDriver(t, iffBackpressure, nil, inForce, &asked)
				queues, attached, err := OpenTUN(TUNOptions{Name: name, Persist: true, Queues: 3})
				if err != nil {
					t.Fatal(err)
				}
				name = attached
				t.Cleanup(func() { CloseTUN(queues) })
				if _, err := Configure(name, 1500, []netip.Prefix{netip.MustParsePrefix("10.98.4.1/32")}, false); err != nil {
					t.Fatal(err)
				}
				if inForce == c.before {
					CloseTUN(queues)
				}
			}
			if c.before != 0xffff {
				open(c.before)
			}
			before := c.before
			c.before = 0xffff
			open(c.inForce)
			out, err := exec.Command("tc", "qdisc", "show", "dev", name).CombinedOutput()
			if err != nil {
				t.Fatal(err, string(out))
			}
			if s := string(out); !strings.HasPrefix(s, c.want+" ") || (strings.Count(s, "\n") > 1) != (c.want == fifos) {
				t.Errorf("after %#x:\n%s", before, s)
			}
		})
	}
}
