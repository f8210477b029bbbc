package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
)

// conn is an open connection to a resolver. Its two goroutines end after close; wait waits for them.
type conn struct {
	of   *resolver
	f    *os.File
	out  chan []byte
	over chan struct{}
	once sync.Once
	wg   sync.WaitGroup
}

// newConn owns fd from here on, also on error.
func newConn(fd int, x *exchange, of *resolver) (*conn, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		closeFD(fd)
		return nil, fmt.Errorf("cannot use the connection: %w", err)
	}
	// Questions are small and nobody waits for more of them. Where it fails they are only late.
	_ = syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
	c := &conn{
		of:   of,
		f:    os.NewFile(uintptr(fd), "resolver"),
		out:  make(chan []byte, x.inFlight),
		over: make(chan struct{}),
	}
	c.wg.Add(2)
	go c.writeLoop(x)
	go c.readLoop(x)
	return c, nil
}

func closeFD(fd int) { _ = syscall.Close(fd) }

// write queues a message and its length. It does not block; false: the resolver takes nothing.
func (c *conn) write(wire []byte) bool {
	// The bytes are copied: a question that is asked again gets another ID.
	select {
	case c.out <- append([]byte(nil), wire...):
		return true
	default:
		return false
	}
}

func (c *conn) close() {
	c.once.Do(func() {
		close(c.over)
		_ = c.f.Close()
	})
}

func (c *conn) wait() { c.wg.Wait() }

func (c *conn) writeLoop(x *exchange) {
	defer c.wg.Done()
	var buf []byte
	for {
		select {
		case <-c.over:
			return
		case wire := <-c.out:
			buf = append(buf[:0], wire...)
		}
		for more := true; more && len(buf) < 4096; { // what is there goes in one segment: RFC 7766 8
			select {
			case wire := <-c.out:
				buf = append(buf, wire...)
			default:
				more = false
			}
		}
		if _, err := c.f.Write(buf); err != nil {
			c.post(x, nil, err)
			return
		}
		if cap(buf) > 16<<10 {
			buf = nil
		}
	}
}

func (c *conn) readLoop(x *exchange) {
	defer c.wg.Done()
	var length [2]byte
	for {
		if _, err := io.ReadFull(c.f, length[:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("it closed the connection")
			}
			c.post(x, nil, err)
			return
		}
		n := int(binary.BigEndian.Uint16(length[:]))
		if n < headerLen {
			c.post(x, nil, fmt.Errorf("it sent a message of %d bytes", n))
			return
		}
		msg := make([]byte, n)
		if _, err := io.ReadFull(c.f, msg); err != nil {
			c.post(x, nil, err)
			return
		}
		if !c.post(x, msg, nil) {
			return
		}
	}
}

func (c *conn) post(x *exchange, msg []byte, err error) bool {
	select {
	case x.msgs <- message{c, msg, err}:
		return true
	case <-c.over:
		return false
	}
}
