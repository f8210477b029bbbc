package hosttest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// canary stands before a probe's number and the number of the shot, in every payload.
const canary = "canary-of-viasocks"

const canaryLen = len(canary) + 6

func putCanary(probe int, shot uint32) []byte {
	b := append([]byte(nil), canary...)
	b = binary.BigEndian.AppendUint16(b, uint16(probe))
	return binary.BigEndian.AppendUint32(b, shot)
}

func findCanary(f []byte) (probe int, shot uint32, ok bool) {
	i := bytes.Index(f, []byte(canary))
	if i < 0 || len(f) < i+canaryLen {
		return 0, 0, false
	}
	f = f[i+len(canary):]
	return int(binary.BigEndian.Uint16(f)), binary.BigEndian.Uint32(f[2:]), true
}

// nobody is the number of the probe that frames are laid to which are no probe's.
const nobody = -1

// endpoint names a probe by where it sends to; port 0 is any, proto 0 too.
type endpoint struct {
	proto uint8
	addr  netip.Addr
	port  uint16
}

// fragment is what the fragments of one datagram have in common.
type fragment struct {
	src, dst netip.Addr
	id       uint32
}

// sighting is one frame that left the host and should not have, while it is closed.
type sighting struct {
	probe int
	shot  uint32 // 0: unknown
	at    time.Time
	what  packet
}

// recorder sees all frames that the host sends on its uplink.
type recorder struct {
	f    *os.File
	done chan struct{}

	mu        sync.Mutex
	owners    map[endpoint]int
	sightings []sighting
	harmless  map[string]int
	proxyTCP  map[netip.AddrPort]bool
	proxyUDP  map[netip.Addr]bool
	answers   func(packet) bool // answers to connections from outside; may be nil
	cut       map[fragment]bool // datagrams to the proxy that came in fragments
	handled   atomic.Int64      // frames
	given     atomic.Int64      // by the kernel
	dropped   atomic.Int64      // by the kernel, for want of room
}

// maxSightings bounds what is kept of the positive control and of a leak.
const maxSightings = 1 << 18

func newRecorder(w *world) *recorder {
	r := &recorder{
		done: make(chan struct{}), owners: map[endpoint]int{}, harmless: map[string]int{}, cut: map[fragment]bool{},
		proxyTCP: map[netip.AddrPort]bool{}, proxyUDP: map[netip.Addr]bool{},
	}
	w.t.Helper()
	w.in("router", func() error {
		all := int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})) // in network byte order
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("cannot record: %w", err)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil { // no root
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 64<<20)
		}
		// When a frame came, however late it is read.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
			return fmt.Errorf("cannot record: %w", err)
		}
		// What the router sends is no concern; without this each would fill the buffer.
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
			return fmt.Errorf("cannot record: %w", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: linkIndex("host0")}); err != nil {
			return fmt.Errorf("cannot record on host0: %w", err)
		}
		r.f = os.NewFile(uintptr(fd), "recorder")
		return nil
	})
	go r.run()
	w.t.Cleanup(func() {
		r.count()
		r.f.Close()
		<-r.done
		if lost := r.dropped.Load(); lost != 0 {
			w.t.Errorf("the recorder lost %d frames: it can't be trusted", lost)
		}
	})
	return r
}

// linkIndex is for a thread in the device's namespace.
func linkIndex(name string) int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil || unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr) != nil {
		return 0
	}
	return int(ifr.Uint32())
}

func (r *recorder) run() {
	defer close(r.done)
	raw, err := r.f.SyscallConn()
	if err != nil {
		return
	}
	buf, oob := make([]byte, 128<<10), make([]byte, 128)
	for {
		var n, k int
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, k, _, _, rerr = unix.Recvmsg(int(fd), buf, oob, 0)
			return rerr != unix.EAGAIN
		})
		if err != nil { // it was closed
			return
		}
		if rerr == nil {
			r.see(buf[:n], when(oob[:k]))
			r.handled.Add(1)
		}
	}
}

// when is the time of a frame by the kernel's clock.
func when(oob []byte) time.Time {
	msgs, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS && len(m.Data) >= 16 {
			return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return time.Now()
}

func (r *recorder) see(f []byte, at time.Time) {
	p := parse(f)
	r.mu.Lock()
	defer r.mu.Unlock()
	if why := harmless(p); why != "" {
		r.harmless[why]++
		return
	}
	to := netip.AddrPortFrom(p.dst, p.dport)
	switch part := (fragment{p.src, p.dst, p.id}); {
	case p.bad:
	case p.later:
		if r.cut[part] { // the first fragment comes first, and has the ports
			r.harmless["proxy, udp, fragment"]++
			return
		}
	case p.proto == unix.IPPROTO_TCP && r.proxyTCP[to]:
		r.harmless["proxy, tcp"]++
		return
	case p.proto == unix.IPPROTO_UDP && r.proxyUDP[p.dst] && relayPort(p.dport):
		r.harmless["proxy, udp"]++
		if p.first {
			r.cut[part] = true
		}
		return
	case r.answers != nil && r.answers(p):
		r.harmless["answer"]++
		return
	}
	s := sighting{probe: nobody, at: at, what: p}
	if id, shot, ok := findCanary(f); ok {
		s.probe, s.shot = id, shot
	} else {
		for _, e := range []endpoint{{p.proto, p.dst, p.dport}, {p.proto, p.dst, 0}, {0, p.dst, 0}} {
			if id, ok := r.owners[e]; ok {
				s.probe = id
				break
			}
		}
	}
	if len(r.sightings) < maxSightings {
		r.sightings = append(r.sightings, s)
	}
}

// take gives what was seen since the last time. It waits until the recorder has read all that the kernel has for it.
func (r *recorder) take() []sighting {
	end := time.Now().Add(time.Minute) // a reader that ended is told by what it did not see
	for last := int64(-1); time.Now().Before(end); testkit.Settle(5*time.Millisecond, "more may come") {
		r.count()
		given := r.given.Load()
		if given == last && r.handled.Load()+r.dropped.Load() >= given {
			break
		}
		last = given
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sightings
	r.sightings = nil
	return s
}

// count asks the kernel how many frames it had for the recorder since the last time, and how many it had no room for.
func (r *recorder) count() {
	raw, err := r.f.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		if st, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			r.given.Add(int64(st.Packets))
			r.dropped.Add(int64(st.Drops))
		}
	})
}

func TestCanary(t *testing.T) {
	b := append([]byte("before"), putCanary(513, 70000)...)
	if id, shot, ok := findCanary(append(b, "behind"...)); !ok || id != 513 || shot != 70000 {
		t.Error(id, shot, ok)
	}
	for n := range len(b) {
		if _, _, ok := findCanary(b[:n]); ok {
			t.Errorf("found in %d bytes of it", n)
		}
	}
}
