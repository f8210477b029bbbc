package e2e

import (
	"testing"

	"golang.org/x/sys/unix"
)

// setMTU sets the MTU of the only device but lo in the app's namespace.
func (a *app) setMTU(mtu uint32) {
	a.t.Helper()
	fd := a.socket(unix.AF_INET, unix.SOCK_DGRAM)
	defer unix.Close(fd)
	name := ""
	for i := uint32(2); i < 64 && name == ""; i++ {
		ifr, err := unix.NewIfreq("")
		if err != nil {
			a.t.Fatal(err)
		}
		ifr.SetUint32(i) // ifr_ifindex
		if unix.IoctlIfreq(fd, unix.SIOCGIFNAME, ifr) == nil {
			name = ifr.Name()
		}
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		a.t.Fatal(err)
	}
	ifr.SetUint32(mtu)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFMTU, ifr); err != nil {
		a.t.Fatalf("cannot set the MTU of %q: %v", name, err)
	}
}

// TestMTUChanges: somebody sets the device's MTU while streams are open. The program's segments follow it at once; what
// goes to the program is no longer than it announced when it connected, whatever the MTU is by now.
func TestMTUChanges(t *testing.T) {
	eachApart(t, func(t *testing.T, offload string) {
		proxy := listenSOCKS(t)
		a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
		eachFamily(t, func(t *testing.T, host string) {
			before, farBefore := pair(t, a, host)
			for _, mtu := range []uint32{1280, 9000, 1500} {
				a.setMTU(mtu)
				testBulk(t, a, host)
			}
			a.setMTU(1280)
			bulk(t, before, farBefore)
			a.setMTU(1500)
		})
	})
}
