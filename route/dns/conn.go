package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// conn is an open stream to a resolver of kind TCP or TLS. Its messages are pipelined (RFC 7766, section 6.2.1). Its
// two goroutines end after close; wait waits for them.
type conn struct {
	of   *resolver
	rw   io.ReadWriter
	shut io.Closer // ends reads and writes of rw at once
	out  chan []byte
	over chan struct{}
	once sync.Once
	wg   sync.WaitGroup
}

// newConn takes ownership of shut.
func newConn(rw io.ReadWriter, shut io.Closer, x *exchange, of *resolver) *conn {
	c := &conn{
		of:   of,
		rw:   rw,
		shut: shut,
		out:  make(chan []byte, x.inFlight),
		over: make(chan struct{}),
	}
	c.wg.Add(2)
	go c.writeLoop(x)
	go c.readLoop(x)
	return c
}

func (c *conn) resolver() *resolver { return c.of }

// send queues a message with its length.
func (c *conn) send(q *query) bool {
	// The bytes are copied, because a question that is repeated gets another ID.
	select {
	case c.out <- append([]byte(nil), q.wire...):
		return true
	default:
		return false
	}
}

func (c *conn) close() {
	c.once.Do(func() {
		close(c.over)
		_ = c.shut.Close()
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
		for more := true; more && len(buf) < 4096; { // everything available goes into one segment (RFC 7766, section 8)
			select {
			case wire := <-c.out:
				buf = append(buf, wire...)
			default:
				more = false
			}
		}
		if _, err := c.rw.Write(buf); err != nil {
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
		if _, err := io.ReadFull(c.rw, length[:]); err != nil {
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
		if _, err := io.ReadFull(c.rw, msg); err != nil {
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
	case x.msgs <- message{link: c, msg: msg, err: err}:
		return true
	case <-c.over:
		return false
	}
}
