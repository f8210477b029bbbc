package kernel

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// openSocket as the first argument has the test's program open a socket: it is of the cgroup in which it was opened,
// whoever uses it.
const openSocket = "open-socket"

func socketMain(family, typ string) int {
	f, _ := strconv.Atoi(family)
	k, _ := strconv.Atoi(typ)
	fd, err := unix.Socket(f, k|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 1
	}
	if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
		return 1
	}
	return 0
}

// socketIn opens a socket in the cgroup of a directory, and in the calling thread's network namespace.
func socketIn(dir string, family, typ int) (int, error) {
	if dir == "" {
		return unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	}
	d, err := os.Open(dir)
	if err != nil {
		return -1, err
	}
	defer d.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "their end")
	defer theirs.Close()
	cmd := exec.Command("/proc/self/exe", openSocket, strconv.Itoa(family), strconv.Itoa(typ))
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
	if out, err := cmd.CombinedOutput(); err != nil {
		return -1, fmt.Errorf("a socket of another cgroup: %w: %s", err, out)
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, fmt.Errorf("no socket came: %v", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("no socket came: %v", err)
	}
	return fds[0], nil
}

// Our own sockets have the mark, are of our cgroup, and go to an upstream's endpoint; with the mark of direct they go
// anywhere, while there is a verdict direct. Whoever has less than that is refused, or carried.
func TestOwnCgroup(t *testing.T) {
	ours, _ := testCgroup(t, "ours")
	theirs, _ := testCgroup(t, "theirs")
	mount, err := cgroupMount()
	if err != nil {
		t.Skip(err)
	}
	deeper := filepath.Join(theirs, "deeper")
	if err := os.Mkdir(filepath.Join(mount, deeper), 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(filepath.Join(mount, deeper))
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		c := testConfig(t)
		c.OwnCgroup = ours
		c.Upstreams = []Endpoint{
			{0, netip.MustParseAddrPort(far4 + ":7777")},
			{0, netip.MustParseAddrPort("[" + far6 + "]:7777")},
		}
		h, tun := up(t, c)
		defer tun.Close()
		x := cgroups{t, w, c.Marks, mount, ours, []string{theirs, deeper}}
		x.check(false)
		if s := ip(t, "rule"); strings.Contains(s, "fwmark 0x77000000") {
			t.Errorf("the mark of direct has a rule: %s", s)
		}
		for _, direct := range []bool{true, false} {
			c.Direct = direct
			if err := h.Change(c); err != nil {
				t.Fatal(err)
			}
			x.check(direct)
		}
		// What is excluded has the same mark, and nobody else may set it.
		c.Exclude.Ports = []PortRange{{123, 123}}
		if err := h.Change(c); err != nil {
			t.Fatal(err)
		}
		x.check(false)
		if !w.passes(true, probe{typ: unix.SOCK_DGRAM, dst: far4, port: 123, mark: c.Marks.Direct}.send) {
			t.Error("what is excluded does not pass with that mark")
		}
		down(t, h)
	})
}

// cgroups are groups whose sockets set our marks.
type cgroups struct {
	t           *testing.T
	w           *world
	marks       Marks
	mount, ours string
	others      []string
}

// check sends from each of the groups, and from the test's own process, which lies higher than any group of ours: of it the
// kernel says nothing.
func (x *cgroups) check(direct bool) {
	x.t.Helper()
	for _, dst := range []string{far4, far6} {
		for _, typ := range []int{unix.SOCK_DGRAM, unix.SOCK_STREAM} {
			for _, group := range append([]string{x.ours, ""}, x.others...) {
				if typ == unix.SOCK_STREAM && (!direct || slices.Contains(x.others, group)) {
					continue // half a second each where it is carried
				}
				x.checkGroup(direct, probe{typ: typ, dst: dst}, group)
			}
		}
	}
}

// checkGroup sends p from a group, with each mark.
func (x *cgroups) checkGroup(direct bool, p probe, group string) {
	x.t.Helper()
	if group != "" {
		p.group = filepath.Join(x.mount, group)
	}
	for _, tt := range []struct {
		mark uint32
		port uint16
		bind string
		want bool
	}{
		{x.marks.Own, 7777, "", group == x.ours},
		{x.marks.Own, 7778, "", false},
		{x.marks.Own, 7777, "eth0", group == x.ours},
		{x.marks.Direct, 7778, "", direct && group == x.ours},
		{x.marks.Direct, 7778, "eth0", direct && group == x.ours},
	} {
		p.mark, p.port, p.bind = tt.mark, tt.port, tt.bind
		if got := x.w.passes(tt.want, p.send); got != tt.want {
			x.t.Errorf(
				"direct %v, type %d to %s:%d, mark %#x, cgroup %q, device %q: passed %v, want %v",
				direct,
				p.typ,
				p.dst,
				p.port,
				p.mark,
				group,
				p.bind,
				got,
				tt.want,
			)
		}
	}
}

// What the kernel says for connections that are closed, the last ACKs of TIME_WAIT and resets, has no socket: of ours it
// comes to the proxy, of a program's it does not leave.
func TestLastWords(t *testing.T) {
	ours, _ := testCgroup(t, "words")
	mount, err := cgroupMount()
	if err != nil {
		t.Skip(err)
	}
	for _, own := range []bool{true, false} {
		inNamespace(t, func(t *testing.T) { lastWords(t, own, ours, filepath.Join(mount, ours)) })
	}
}

func lastWords(t *testing.T, own bool, ours, dir string) {
	w := newWorld(t)
	c := testConfig(t)
	c.OwnCgroup = ours
	for _, a := range []string{far4, far6} {
		c.Upstreams = append(c.Upstreams, Endpoint{unix.IPPROTO_TCP, netip.AddrPortFrom(netip.MustParseAddr(a), 1080)})
	}
	countWords(t, w)
	var h *Host
	var tun *os.File
	if own {
		h, tun = up(t, c)
	}
	var pairs []wordPair
	for _, a := range []string{far4, far6, far4, far6} {
		p := openWords(t, w, netip.MustParseAddr(a), dir, map[bool]int{true: int(c.Marks.Own)}[own])
		defer p.peer.Close()
		pairs = append(pairs, p)
	}
	for _, p := range pairs[:2] { // they close second: TIME_WAIT is here
		unix.Close(p.fd)
	}
	testkit.Settle(100*time.Millisecond, "they are in TIME_WAIT")
	for _, p := range pairs[2:] { // a reset for each thing said to a socket that is closed with something unread
		_, _ = p.peer.Write([]byte("unread"))
	}
	testkit.Settle(100*time.Millisecond, "the resets have left")
	if !own {
		h, tun = up(t, c)
	}
	// The peers hear nothing any more, and so say again and again what nobody acknowledges.
	w.in(func() { nft(t, "add rule inet rec late tcp dport 1080 drop") })
	w.take()
	acks, resets := words(t, w, "acks"), words(t, w, "resets")
	for _, p := range pairs[:2] {
		p.peer.Close() // its FIN comes again and again
	}
	for _, p := range pairs[2:] {
		unix.Close(p.fd)                      // a reset by the socket itself
		_, _ = p.peer.Write([]byte("anyone")) // and one for what comes later
	}
	if own {
		testkit.Eventually(t, "ACKs of TIME_WAIT and resets at the proxy", func() bool {
			return words(t, w, "acks") >= acks+6 && words(t, w, "resets") >= resets+6
		})
	} else {
		testkit.Pace(2 * time.Second) // the peers repeat themselves
		if a, r := words(t, w, "acks")-acks, words(t, w, "resets")-resets; a+r != 0 {
			t.Errorf("of a program %d ACKs and %d resets left", a, r)
		}
		if s := w.take(); len(s) != 0 {
			t.Errorf("of a program there left %v", s)
		}
	}
	t.Logf("own %v: %d ACKs, %d resets", own, words(t, w, "acks")-acks, words(t, w, "resets")-resets)
	down(t, h)
	tun.Close()
}

// wordPair is a connection of a program, and its end at the proxy.
type wordPair struct {
	fd   int
	peer *net.TCPConn
}

// openWords connects a socket in a control group to the proxy.
func openWords(t *testing.T, w *world, dst netip.Addr, dir string, mark int) wordPair {
	t.Helper()
	var l net.Listener
	var err error
	w.in(func() { l, err = net.Listen("tcp", netip.AddrPortFrom(dst, 1080).String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	family := unix.AF_INET
	if dst.Is6() {
		family = unix.AF_INET6
	}
	fd, err := socketIn(dir, family, unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	if mark != 0 {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
	}
	if err := unix.Connect(fd, sockaddr(netip.AddrPortFrom(dst, 1080))); err != nil {
		t.Fatal(err)
	}
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return wordPair{fd, peer.(*net.TCPConn)}
}

// countWords counts the ACKs and resets that come to the proxy.
func countWords(t *testing.T, w *world) {
	t.Helper()
	w.in(func() {
		nft(t, "add table inet rec")
		nft(t, "add chain inet rec in { type filter hook prerouting priority -400; }")
		nft(t, "add chain inet rec late { type filter hook input priority 0; }")
		for _, n := range []string{"acks", "resets"} {
			nft(t, "add counter inet rec "+n)
		}
		nft(t, "add rule inet rec in tcp dport 1080 tcp flags == rst counter name resets")
		nft(t, "add rule inet rec in tcp dport 1080 tcp flags == rst | ack counter name resets")
		nft(t, "add rule inet rec in tcp dport 1080 tcp flags == ack counter name acks")
	})
}

// words is how many ACKs or resets came to the proxy.
func words(t *testing.T, w *world, name string) (n int) {
	t.Helper()
	w.in(func() {
		f := strings.Fields(nft(t, "list", "counter", "inet", "rec", name))
		for i, word := range f {
			if word == "packets" {
				n, _ = strconv.Atoi(f[i+1])
			}
		}
	})
	return n
}
