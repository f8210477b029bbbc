package netns

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The owner of a socket is who made it: the connecting end, the listening end, and a UDP socket. The control group is
// the test's own.
func TestDiagOwner(t *testing.T) {
	d := newTestDiag(t)
	group := ownCgroup(t)
	for _, network := range []string{"tcp4", "tcp6", "tcp"} {
		addr := "127.0.0.1:0"
		switch network {
		case "tcp6":
			addr = "[::1]:0"
		case "tcp":
			addr = ":0"
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Logf("%s: %v", network, err)
			continue
		}
		defer l.Close()
		c, err := net.Dial(l.Addr().Network(), l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		far := c.RemoteAddr().(*net.TCPAddr).AddrPort()
		o, found, err := d.Listener(far)
		if err != nil || !found || o.UID != uint32(os.Getuid()) || o.Inode != inode(t, l.(*net.TCPListener)) ||
			o.Cgroup != group {
			t.Errorf("%s: listener at %v: %+v, %v, %v; want control group %d", network, far, o, found, err, group)
		}
		near := c.LocalAddr().(*net.TCPAddr).AddrPort()
		o, found, err = d.Owner(unix.IPPROTO_TCP, near, far)
		if err != nil || !found || o.UID != uint32(os.Getuid()) || o.Inode != inode(t, c.(*net.TCPConn)) || o.Cgroup != group {
			t.Errorf("%s: connection from %v: %+v, %v, %v", network, near, o, found, err)
		}
		if o, found, err = d.Owner(unix.IPPROTO_TCP, netip.AddrPortFrom(near.Addr(), 1), far); err != nil || found {
			t.Errorf("%s: no such connection: %+v, %v, %v", network, o, found, err)
		}
		if o, found, err = d.Listener(netip.AddrPortFrom(far.Addr(), 1)); err != nil || found {
			t.Errorf("%s: nobody listens: %+v, %v, %v", network, o, found, err)
		}
	}
	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	src := u.LocalAddr().(*net.UDPAddr).AddrPort()
	o, found, err := d.Owner(unix.IPPROTO_UDP, src, netip.MustParseAddrPort("127.0.0.9:9"))
	if err != nil || !found || o.Inode != inode(t, u.(*net.UDPConn)) {
		t.Errorf("UDP: %+v, %v, %v", o, found, err)
	}
	if _, _, err := d.Owner(unix.IPPROTO_SCTP, src, src); err == nil {
		t.Error("SCTP was asked for")
	}
	if _, _, err := d.Owner(unix.IPPROTO_TCP, src, netip.AddrPort{}); err == nil {
		t.Error("no destination, and no error")
	}
}

type rawConner interface {
	SyscallConn() (syscall.RawConn, error)
}

func inode(t *testing.T, c rawConner) uint32 {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if cerr := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return uint32(st.Ino)
}

// ownCgroup is the inode of the directory of this process's control group; 0 where there is no version 2.
func ownCgroup(t *testing.T) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
				var st unix.Stat_t
				var fs unix.Statfs_t
				if unix.Stat(mount+path, &st) == nil && unix.Statfs(mount, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
					return st.Ino
				}
			}
		}
	}
	t.Skip("no control groups of version 2")
	return 0
}
