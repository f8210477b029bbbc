package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A named namespace belongs to somebody else and is left as it was. The TUN disappears with our process, with its addresses and
// routes. What remains is what we changed at lo and in sysctls. The keeper is a process of ours inside that restores it when we
// have ended, also if we were killed.

const (
	// keeperName is argv[0] of the keeper; argv[1] is the number of its socket.
	keeperName = "viasocks-restore"
	// keeperWait limits the waits for the keeper, which makes a few system calls.
	keeperWait = 10 * time.Second
)

// keptSysctls are the sysctls that we may change.
var keptSysctls = []string{
	"net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6", "net/ipv6/conf/lo/disable_ipv6",
	"net/ipv6/conf/lo/addr_gen_mode", "net/ipv6/conf/lo/accept_ra", "net/ipv6/conf/lo/autoconf", "net/ipv4/ping_group_range",
	"net/ipv4/ip_unprivileged_port_start",
}

// found is the state of a namespace before we changed it.
type found struct {
	Err     string `json:",omitempty"` // why it cannot be used
	Up      bool   // lo
	Addrs   []netip.Prefix
	Sysctls map[string]string
}

// look returns the state of the calling thread's namespace. A namespace with another network device is refused, because the
// program could get past the proxy by it.
func look() (s found, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return s, fmt.Errorf("cannot list its devices: %w", err)
	}
	for _, l := range links {
		switch a := l.Attrs(); {
		case a.Name == "lo":
			s.Up = a.Flags&net.FlagUp != 0
			all, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return s, fmt.Errorf("cannot list the addresses of lo: %w", err)
			}
			for _, one := range all {
				s.Addrs = append(s.Addrs, prefixOf(one.IPNet))
			}
		case a.Flags&net.FlagUp != 0:
			return s, fmt.Errorf("it has the network device %s, which the program could use to avoid the proxy: "+
				"take one that has only lo, made by 'ip netns add'", a.Name)
		}
	}
	s.Sysctls = make(map[string]string)
	for _, key := range keptSysctls {
		if v := sysctlValue(strings.ReplaceAll(key, "/", ".")); v != "" {
			s.Sysctls[key] = v
		}
	}
	return s, nil
}

func prefixOf(n *net.IPNet) netip.Prefix {
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

// loopback4 is what the kernel gives lo when it comes up.
var loopback4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 8)

// restore gives the calling thread's namespace the state s again, in which it had not the addresses ours.
func (s *found) restore(ours []netip.Prefix) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("cannot find lo: %w", err)
	}
	var failed []error
	note := func(err error) {
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			failed = append(failed, err)
		}
	}
	// Before lo goes down: writing addr_gen_mode gives it ::1 even if it is down.
	for _, key := range keptSysctls {
		if old, ok := s.Sysctls[key]; ok && old != sysctlValue(strings.ReplaceAll(key, "/", ".")) {
			note(sysctl(key, old))
		}
	}
	if !s.Up {
		note(netlink.LinkSetDown(lo))
		ours = append(slices.Clone(ours), loopback4)
	}
	for _, p := range ours {
		if !slices.Contains(s.Addrs, p) {
			note(netlink.AddrDel(lo, &netlink.Addr{IPNet: ipNet(p)}))
		}
	}
	return errors.Join(failed...)
}

// keeper is the process, seen from outside.
type keeper struct {
	ns    *os.File // locked
	sock  *os.File // the keeper restores the namespace when all copies of it are closed
	pid   int
	was   found
	added []netip.Prefix
}

// startKeeper starts the keeper in ns. It takes ownership of ns, even on error. added are the addresses that lo will get.
func startKeeper(ns *os.File, name string, added []netip.Prefix) (_ *keeper, err error) {
	k := &keeper{ns: ns, added: added}
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot use the network namespace %q: %w", name, err)
			k.Close()
		}
	}()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	k.sock = os.NewFile(uintptr(pair[0]), "keeper")
	theirs := os.NewFile(uintptr(pair[1]), "keeper")
	defer theirs.Close()
	if err := within(ns, func() error { return k.start(theirs) }); err != nil {
		return nil, err
	}
	c, err := net.FileConn(k.sock)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(keeperWait)); err != nil {
		return nil, err
	}
	msg, err := json.Marshal(added)
	if err != nil {
		return nil, err
	}
	if _, err := c.Write(frame(msg)); err != nil {
		return nil, err
	}
	if msg, err = readFrame(c, nil); err == nil {
		err = json.Unmarshal(msg, &k.was)
	}
	if err == nil && k.was.Err != "" {
		err = errors.New(k.was.Err)
	}
	return k, err
}

func (k *keeper) start(sock *os.File) (err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	env := []string{"GOMAXPROCS=1"}
	if dir, ok := os.LookupEnv("GOCOVERDIR"); ok {
		env = append(env, "GOCOVERDIR="+dir)
	}
	k.pid, _, err = syscall.StartProcess("/proc/self/exe", []string{keeperName, "3"}, &syscall.ProcAttr{
		Dir: "/", Env: env, Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), sock.Fd(), k.ns.Fd()},
		Sys: &syscall.SysProcAttr{Setsid: true}, // no signal of the terminal reaches it
	})
	return err
}

// Close makes the keeper restore the namespace and waits for that. If the keeper was killed, Close does its work. It may be
// called twice, and k may be nil.
func (k *keeper) Close() {
	if k == nil || k.ns == nil {
		return
	}
	if k.sock != nil {
		_ = k.sock.Close()
	}
	if k.pid != 0 && !k.ended() && k.was.Sysctls != nil {
		_ = within(k.ns, func() error { return k.was.restore(k.added) })
	}
	_ = k.ns.Close()
	k.ns = nil
}

// ended waits for the keeper and reports whether it has restored the namespace.
func (k *keeper) ended() bool {
	late := time.AfterFunc(keeperWait, func() { _ = syscall.Kill(k.pid, syscall.SIGKILL) })
	defer late.Stop()
	var ws syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(k.pid, &ws, 0, nil); err != syscall.EINTR {
			return err == nil && ws.Exited() && ws.ExitStatus() == 0
		}
	}
}

// keeperMain is the keeper. It tells what it found, waits for the end of the other side, and restores.
func keeperMain(sock int) (exit int) {
	// A service manager may end all our processes at once, and then this one has its work to do.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	unix.CloseOnExec(4) // the lock, which ends with this process
	var added []netip.Prefix
	msg, err := readFrame(fdReader(sock), nil)
	if err == nil {
		err = json.Unmarshal(msg, &added)
	}
	if err != nil {
		return 1 // nothing was changed
	}
	s, err := look()
	if err != nil {
		s = found{Err: err.Error()}
	}
	if msg, err = json.Marshal(s); err != nil {
		return 1
	}
	if _, err := unix.Write(sock, frame(msg)); err != nil || s.Err != "" {
		return 1
	}
	for {
		var b [1]byte
		if _, err := (fdReader(sock)).Read(b[:]); err != nil {
			break
		}
	}
	if s.restore(added) != nil {
		return 1
	}
	return 0
}
