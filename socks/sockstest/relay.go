package sockstest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// drainLimit limits the wait until bytes sent before a reset are acknowledged, because a reset discards what is
// queued.
const drainLimit = 2 * time.Second

// bufs are held only while bytes move, so that an idle connection holds none.
var bufs = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// pair is two connections that end in the same way.
type pair struct {
	a, b *net.TCPConn
	once sync.Once
	mu   sync.Mutex
	fins int
}

// relayTCP copies in both directions until both saw FIN or one side was reset. It closes both connections.
func relayTCP(a, b *net.TCPConn) {
	p := &pair{a: a, b: b}
	var wg sync.WaitGroup
	wg.Go(func() { p.copy(a, b) })
	p.copy(b, a)
	wg.Wait()
	a.Close()
	b.Close()
}

func (p *pair) copy(src, dst *net.TCPConn) {
	rc, err := src.SyscallConn()
	if err != nil {
		p.abort()
		return
	}
	for {
		buf, n, err := readSome(rc)
		if n > 0 {
			err = p.write(src, dst, rc, (*buf)[:n])
			bufs.Put(buf)
			if err != nil {
				p.abort() // dst is reset, and now src too
				return
			}
			continue
		}
		if err == io.EOF {
			dst.CloseWrite()
			p.fin()
			if watchReset(rc) {
				drain(dst)
				p.abort()
			}
			return
		}
		drain(dst)
		p.abort()
		return
	}
}

// readSome waits without a buffer and reads with one. n is 0 only with an error.
func readSome(rc syscall.RawConn) (buf *[]byte, n int, err error) {
	werr := rc.Read(func(fd uintptr) bool {
		buf = bufs.Get().(*[]byte)
		for {
			n, err = unix.Read(int(fd), *buf)
			if err != unix.EINTR {
				break
			}
		}
		if n > 0 {
			return true
		}
		bufs.Put(buf)
		if err == nil {
			err = io.EOF
		}
		return err != unix.EAGAIN
	})
	if werr != nil {
		return nil, 0, werr
	}
	return buf, max(n, 0), err
}

// write writes all of b, however long dst takes, unless src is reset meanwhile.
func (p *pair) write(src, dst *net.TCPConn, rc syscall.RawConn, b []byte) error {
	for len(b) > 0 {
		dst.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := dst.Write(b)
		b = b[n:]
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err != nil && wasReset(rc) {
			return unix.ECONNRESET
		}
	}
	return nil
}

// fin counts a direction that saw FIN. The second one releases the watchers.
func (p *pair) fin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fins++; p.fins == 2 {
		p.a.SetReadDeadline(time.Unix(1, 0))
		p.b.SetReadDeadline(time.Unix(1, 0))
	}
}

// abort resets both.
func (p *pair) abort() {
	p.once.Do(func() {
		p.a.SetLinger(0)
		p.b.SetLinger(0)
		p.a.Close()
		p.b.Close()
	})
}

// watchReset waits, after FIN was read, for a reset (true) or for the end of the pair.
func watchReset(rc syscall.RawConn) (reset bool) {
	rc.Read(func(fd uintptr) bool {
		if e, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
			reset = true
			return true
		}
		i, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		return err != nil || i.State == tcpClose
	})
	return reset
}

const tcpClose = 7 // TCP_CLOSE of the kernel's tcp_states.h

// wasReset takes the pending error of a connection. Its state would not tell: two FINs in order also end in CLOSE,
// possibly with bytes still to be read.
func wasReset(rc syscall.RawConn) (reset bool) {
	rc.Control(func(fd uintptr) {
		e, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		reset = err == nil && e != 0
	})
	return reset
}

// drain waits until what was written to c is acknowledged, so that it arrives before a reset.
func drain(c *net.TCPConn) {
	rc, err := c.SyscallConn()
	if err != nil {
		return
	}
	for end := time.Now().Add(drainLimit); time.Now().Before(end); time.Sleep(time.Millisecond) {
		queued := 0
		if rc.Control(func(fd uintptr) { queued, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }) != nil || err != nil ||
			queued == 0 {
			return
		}
	}
}

// relayAny copies between connections of which one is not TCP. It passes on FIN where there is a CloseWrite.
func relayAny(a, b net.Conn) {
	type closeWriter interface{ CloseWrite() error }
	one := func(dst, src net.Conn) {
		io.Copy(dst, src)
		if cw, ok := dst.(closeWriter); ok {
			cw.CloseWrite()
		} else {
			dst.Close()
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { one(a, b) })
	one(b, a)
	wg.Wait()
	a.Close()
	b.Close()
}
