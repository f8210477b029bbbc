package relay

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/count"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// StreamCodec puts datagrams into the frames of a stream and finds them there: UDP over TCP. Its methods are called
// concurrently from the frame reader and from the loop, so it must have no state that changes.
type StreamCodec interface {
	// AppendHeader appends to b what precedes a payload of size bytes to dst. If it returns b unchanged, there is no
	// header for dst, and the datagram is dropped.
	AppendHeader(b []byte, dst netip.AddrPort, size int) []byte
	// ParseHeader parses the beginning of b: n is the length of the header, and size that of the payload after it. n
	// is 0 if b is too short. A frame whose src is invalid is dropped and counted. An error ends the link, because
	// the beginning of the next frame is unknown; it should be a fixed value that is made once.
	ParseHeader(b []byte) (src netip.AddrPort, n, size int, err error)
}

// Limits of a stream link.
const (
	maxFrameHead = 1 << 10 // a longer header is malformed
	maxFrame     = maxFrameHead + 1<<16
	streamRead   = 4 * recvBuf // for one recv: more than a frame
	// streamQueue is how many bytes wait for room in the socket; as many wait unsent in the kernel. Older datagrams
	// are of no use to a program that uses UDP.
	streamQueue = 128 << 10
)

var (
	errFrame = errors.New("a frame of the upstream is malformed")
	errFIN   = fmt.Errorf("the upstream closed the connection that carries the datagrams: %w", io.EOF)
)

// streamLink implements PacketLink on a connection. The loop owns fd and closes it; mu keeps it open during Send.
type streamLink struct {
	loop.Node
	l      *Loop
	codec  StreamCodec
	sink   func([]flow.Packet)
	closed func(error)
	max    int // longest payload

	mu   sync.Mutex
	fd   int
	shut bool
	fail unix.Errno // why Send could not send; the loop then ends the link
	out  []byte     // whole frames that wait for room in the socket; the first one may be partly sent

	in   []byte // the beginning of a frame; belongs to the loop
	st   LinkCounters[atomic.Uint64]
	over bool // belongs to the loop
}

// OpenStreamPackets makes a link of a connection to an upstream that carries datagrams in frames, and takes ownership
// of it, even on error. Payloads of more than max bytes are dropped and counted. If the loop already watches the
// socket, OpenStreamPackets must be called on the loop's goroutine. sink and closed are as for OpenPackets; a FIN of
// the upstream also ends the link.
//
// What does not fit into the socket waits in a queue of 128 KiB. What does not fit there is dropped and counted.
func (l *Loop) OpenStreamPackets(s loop.Socket, codec StreamCodec, max int, sink func([]flow.Packet),
	closed func(error)) (PacketLink, error) {
	k := &streamLink{l: l, fd: s.FD(), codec: codec, sink: sink, closed: closed, max: max}
	k.Init(k)
	// Without TCP_NODELAY, a datagram may wait for the acknowledgement of the one before. Inside TLS the socket is
	// not a TCP socket, and neither option is needed.
	_ = unix.SetsockoptInt(k.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	_ = unix.SetsockoptInt(k.fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, streamQueue)
	if !l.Join(&k.Node) {
		s.Close()
		return nil, fmt.Errorf("cannot open a packet link: %w", ErrClosed)
	}
	if s.Watched(l.Loop) {
		l.Adopt(&k.Node, s)
		l.Enqueue(&k.Node)
	} else {
		_ = s.Release()
		l.Note(&k.Node, opened)
	}
	return k, nil
}

// Close implements PacketLink. Datagrams that still wait are lost.
func (k *streamLink) Close() error {
	k.mu.Lock()
	k.shut = true
	k.mu.Unlock()
	k.l.Note(&k.Node, ended)
	return nil
}

// Stats implements PacketLink.
func (k *streamLink) Stats() (s LinkStats) {
	count.Add(&s, &k.st)
	return s
}

// Overflowed implements PacketLink: TCP loses nothing.
func (k *streamLink) Overflowed() uint64 { return 0 }

// Send implements PacketLink. A datagram counts as sent when the socket or the queue has accepted it.
func (k *streamLink) Send(ps []flow.Packet) (sent int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.shut {
		return 0, ErrClosed
	}
	b := streamPool.Get().(*streamBatch)
	defer streamPool.Put(b)
	bytes := uint64(0)
	for i := range ps {
		p := &ps[i]
		switch {
		case len(p.Payload) > k.max:
			k.st.TooLarge.Add(1)
			continue
		case k.fail != 0 || len(b.buf)+len(k.out)+maxFrameHead+len(p.Payload) > streamQueue && !k.flush(b, len(p.Payload)):
			k.st.Full.Add(1)
			continue
		}
		at := len(b.buf)
		if b.buf = k.codec.AppendHeader(b.buf, p.Dst, len(p.Payload)); len(b.buf) <= at {
			k.st.Unsendable.Add(1)
			continue
		}
		b.buf = append(b.buf, p.Payload...)
		sent++
		bytes += uint64(len(p.Payload))
	}
	k.flush(b, 0)
	k.st.Sent.Add(uint64(sent))
	k.st.SentBytes.Add(bytes)
	return sent, nil
}

// streamBatch is the content of one write. It is pooled, so a link that does not send owns none.
type streamBatch struct{ buf []byte }

var streamPool = sync.Pool{New: func() any { return &streamBatch{make([]byte, 0, streamQueue)} }}

// flush writes the content of the batch after what already waits, and empties the batch. What the socket does not
// accept waits. It reports whether there is room for a frame with a payload of size bytes. The caller holds mu.
func (k *streamLink) flush(b *streamBatch, size int) (room bool) {
	if k.fail == 0 && len(b.buf) > 0 {
		if len(k.out) == 0 {
			rest := k.write(b.buf)
			k.out = append(k.out, rest...)
		} else {
			k.out = append(k.out, b.buf...) // the loop writes it when the socket has room
		}
	}
	b.buf = b.buf[:0]
	return k.fail == 0 && len(k.out)+maxFrameHead+size <= streamQueue
}

// write returns what the socket did not accept. The caller holds mu.
func (k *streamLink) write(b []byte) (rest []byte) {
	for len(b) > 0 {
		n, e := send(k.fd, b)
		switch e {
		case 0:
			b = b[n:]
		case unix.EAGAIN:
			return b
		default:
			k.fail = e
			k.l.Note(&k.Node, failed)
			return nil
		}
	}
	return nil
}

// Turn implements loop.Task.
func (k *streamLink) Turn() (again bool) {
	switch {
	case k.over:
		return false
	case k.Got&ended != 0:
		k.finish(nil)
		return false
	case k.Got&opened != 0:
		k.Got &^= opened
		if err := k.l.Watch(&k.Node, k.fd, loop.Stream); err != nil {
			k.finish(fmt.Errorf("cannot watch a packet link: %w", err))
			return false
		}
	}
	if k.Got&sockIn != 0 {
		again = k.receive()
	}
	if !k.over && k.Got&(sockOut|failed) != 0 {
		k.Got &^= sockOut
		k.drain()
	}
	return again && !k.over
}

// drain writes what waits. If something stays, an edge of the socket will follow.
func (k *streamLink) drain() {
	k.mu.Lock()
	if k.fail == 0 && len(k.out) > 0 {
		rest := k.write(k.out)
		if k.out = append(k.out[:0], rest...); len(k.out) == 0 {
			k.out = nil
		}
	}
	fail := k.fail
	k.mu.Unlock()
	if fail != 0 {
		k.finish(fail)
	}
}

// Shutdown implements loop.Task.
func (k *streamLink) Shutdown() { k.finish(ErrClosed) }

// finish closes the connection and calls closed, unless Close was called.
func (k *streamLink) finish(err error) {
	if k.over {
		return
	}
	k.over = true
	k.l.Forget(&k.Node)
	k.mu.Lock()
	tell := !k.shut
	k.shut = true
	_ = loop.Close(k.fd)
	k.fd, k.out = -1, nil
	k.mu.Unlock()
	k.in = nil
	k.l.Leave(&k.Node)
	if tell && k.closed != nil {
		k.closed(err)
	}
	k.sink, k.closed = nil, nil
}

// receive passes received frames to sink, for one turn.
func (k *streamLink) receive() (again bool) {
	if k.l.recv == nil {
		k.l.recv = newRecvBuffers()
	}
	b := k.l.recv
	for bytes := 0; bytes < turnBytes; {
		buf := b.data[:streamRead]
		had := copy(buf, k.in)
		n, e := recv(k.fd, buf[had:], 0)
		switch {
		case e == unix.EAGAIN:
			k.Got &^= sockIn
			return false
		case e != 0:
			k.finish(e)
			return false
		case n == 0:
			k.finish(errFIN)
			return false
		}
		bytes += n
		rest, err := k.frames(b, buf[:had+n])
		if err != nil {
			k.st.Malformed.Add(1)
			k.finish(err)
			return false
		}
		if k.in = append(k.in[:0], rest...); len(rest) == 0 {
			k.in = nil
		}
		if had+n < streamRead && k.Got&(sockHup|sockErr) == 0 {
			k.Got &^= sockIn // everything was read: what comes later is a new edge
			return false
		}
	}
	return true
}

// frames passes the whole frames of data to sink, and returns what follows them.
func (k *streamLink) frames(b *recvBuffers, data []byte) (rest []byte, err error) {
	var bad, bytes uint64
	b.pkts = b.pkts[:0]
	for len(data) > 0 {
		src, n, size, e := k.codec.ParseHeader(data)
		outside := n < 0 || size < 0 || n > maxFrameHead || size > maxFrame-maxFrameHead
		if e == nil && (outside || n == 0 && len(data) >= maxFrameHead) {
			e = errFrame
		}
		if err = e; err != nil || n == 0 || len(data) < n+size {
			break
		}
		d := data[n : n+size : n+size]
		data = data[n+size:]
		if !src.IsValid() {
			bad++
			continue
		}
		bytes += uint64(size)
		b.pkts = append(b.pkts, flow.Packet{Src: src, Payload: d})
		if len(b.pkts) == recvPackets {
			k.hand(b, bytes)
			bytes = 0
		}
	}
	if bad > 0 {
		k.st.Malformed.Add(bad)
	}
	if len(b.pkts) > 0 {
		k.hand(b, bytes)
	}
	return data, err
}

// hand passes the collected datagrams to the sink. bytes is their size. They are counted first, so that a sink that
// sees a datagram also sees it counted.
func (k *streamLink) hand(b *recvBuffers, bytes uint64) {
	k.st.Received.Add(uint64(len(b.pkts)))
	k.st.ReceivedBytes.Add(bytes)
	k.sink(b.pkts)
	b.pkts = b.pkts[:0]
}
