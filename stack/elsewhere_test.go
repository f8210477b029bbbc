package stack

import (
	"encoding/binary"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// The frames of another process's flows go to it, ICMP and later fragments go to both, and all else stays. When a flow
// has ended there, its frames stay, too.
func TestElsewhere(t *testing.T) {
	p := newPair(t, offAll, Config{Shards: 2})
	conn, stream := p.connect(srv4)
	keys := p.st.TCPKeys()
	if len(keys) != 1 || keys[0].Proto != flow.TCP || keys[0].Dst != srv4 || keys[0].Src.String() != conn.LocalAddr().String() {
		t.Fatalf("the flows are %v", keys)
	}
	e, far := newElsewhere(t, append(keys, Key{Proto: flow.UDP, Src: app4}))
	defer far.Close()
	defer e.Close()
	p.st.SetElsewhere(e)
	if _, err := conn.Write([]byte("for the other process")); err != nil {
		t.Fatal(err)
	}
	if q, _ := nextLeft(t, far); q.proto != protoTCP {
		t.Errorf("protocol %d", q.proto)
	}
	p.inject(bareFrame(protoUDP, 9))
	awaitLeft(t, far, protoUDP)                        // the segment may come again
	p.inject(echoFrame(app4.Addr(), far4.Addr(), nil)) // one process answers it: it is ours alone
	p.inject(bareFrame(protoICMP, 9))
	if last := awaitLeft(t, far, protoICMP); last[ip4HeaderLen] != 13 {
		t.Errorf("ICMP of type %d went to the other process", last[ip4HeaderLen])
	}
	testkit.Eventually(t, "both to be seen here, too", func() bool { return p.st.Stats().DroppedICMP == 2 })
	other, their := p.connect(srv6) // a flow of our own
	if _, err := other.Write([]byte("y")); err != nil {
		t.Fatal(err)
	}
	if err := their.await(flow.Readable); err != nil {
		t.Error(err)
	}
	if left := e.Ended(keys); left != 1 {
		t.Errorf("%d flows are left", left)
	}
	if err := stream.await(flow.Readable); err != nil { // the segment comes again
		t.Error(err)
	}
	p.st.SetElsewhere(nil)
	if e.Lost() != 0 {
		t.Errorf("%d frames were lost", e.Lost())
	}
	if keys := p.st.TCPKeys(); len(keys) != 2 || slices.Contains(keys, Key{}) {
		t.Errorf("the flows are %v", keys)
	}
}

// newElsewhere leaves flows to another process, whose end of the socket is far.
func newElsewhere(t *testing.T, keys []Key) (e *Elsewhere, far *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	e, err = NewElsewhere(keys, []*os.File{os.NewFile(uintptr(fds[0]), "near")})
	if err != nil {
		t.Fatal(err)
	}
	return e, os.NewFile(uintptr(fds[1]), "far")
}

// nextLeft returns the next frame that was left to the other process.
func nextLeft(t *testing.T, far *os.File) (packet, []byte) {
	t.Helper()
	b := make([]byte, tun.HeaderLen+tun.MaxFrame)
	_ = far.SetReadDeadline(time.Now().Add(testkit.Patience))
	n, err := far.Read(b)
	if err != nil || n < tun.HeaderLen {
		t.Fatalf("%d bytes of a frame: %v", n, err)
	}
	frame := b[tun.HeaderLen:n]
	q, ok := parseIP(frame)
	if !ok {
		t.Fatalf("no frame: %x", b[:n])
	}
	return q, frame
}

// awaitLeft returns the next frame of a protocol that was left to the other process.
func awaitLeft(t *testing.T, far *os.File, proto byte) []byte {
	t.Helper()
	for {
		if q, frame := nextLeft(t, far); q.proto == proto {
			return frame
		}
	}
}

// A process that does not read costs frames, which are counted, and no time.
func TestElsewhereDoesNotWait(t *testing.T) {
	e, far := newElsewhere(t, []Key{{Proto: flow.UDP, Src: app4}})
	defer far.Close()
	defer e.Close()
	frame := bareFrame(protoUDP, 1400)
	const most = 100_000
	for n := 0; e.Lost() == 0; n++ {
		if n == most {
			t.Fatal("nothing is lost")
		}
		if !e.take(&tun.Header{}, frame) {
			t.Fatal("the frame is not the other process's")
		}
	}
}

// bareFrame is an IPv4 packet from app4 to far4 with n bytes after its IP header: the ports, or an ICMP echo request.
func bareFrame(proto byte, n int) []byte {
	b := make([]byte, ip4HeaderLen+n)
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], app4.Addr().AsSlice())
	copy(b[16:], far4.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[10:], ^checksum.Checksum(b[:ip4HeaderLen], 0))
	u := b[ip4HeaderLen:]
	if proto == protoICMP {
		u[0] = 13 // timestamp
		binary.BigEndian.PutUint16(u[2:], ^checksum.Checksum(u, 0))
		return b
	}
	binary.BigEndian.PutUint16(u, app4.Port())
	binary.BigEndian.PutUint16(u[2:], far4.Port())
	return b
}

// inject sends a frame as the app's kernel would.
func (a *testApp) inject(b []byte) {
	a.t.Helper()
	if err := a.dev.Write(&tun.Header{}, [][]byte{b}); err != nil {
		a.t.Fatal(err)
	}
}
