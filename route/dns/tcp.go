package dns

import (
	"encoding/binary"
	"io"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	maxAskers    = 256              // concurrent connections of the app
	askerPending = 32               // questions of one connection that wait for an answer; meanwhile no more are read
	askerWrite   = 10 * time.Second // time for the app to accept an answer
)

// askers are the open connections of the app.
type askers struct {
	mu   sync.Mutex
	open map[*asker]struct{}
	over bool
	wg   sync.WaitGroup
}

// asker is a connection over which the app asks (RFC 7766). Questions may arrive before earlier ones are answered,
// and answers are sent in the order in which they are found.
type asker struct {
	s     *Server
	f     *os.File
	asked netip.AddrPort
	judge Judge
	seen  func(answer []byte)
	slots chan struct{} // one for each question without a written answer
	out   chan []byte   // the same capacity, so an answer never waits for room
}

// ServeTCP answers the questions that arrive on fd, a connected and non-blocking stream socket of which it takes
// ownership. It does not block. It ends the connection when it is idle, when the input is not a question, when there
// are too many connections, and with Run. asked is as in Handle, and judge as in HandleJudged. seen, if not nil, gets
// each answer before the app does, from any goroutine, and must not keep it.
func (s *Server) ServeTCP(fd int, asked netip.AddrPort, judge Judge, seen func(answer []byte)) {
	a := &asker{s: s, f: os.NewFile(uintptr(fd), "asker"), asked: asked, judge: judge, seen: seen,
		slots: make(chan struct{}, askerPending), out: make(chan []byte, askerPending)}
	t := &s.askers
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || len(t.open) >= maxAskers {
		s.count.Dropped.Add(1)
		_ = a.f.Close()
		return
	}
	if t.open == nil {
		t.open = make(map[*asker]struct{})
	}
	t.open[a] = struct{}{}
	t.wg.Go(a.run)
}

// close ends all connections and waits for their goroutines.
func (t *askers) close() {
	t.mu.Lock()
	t.over = true
	for a := range t.open {
		_ = a.f.Close()
	}
	t.mu.Unlock()
	t.wg.Wait()
}

// run reads to the end, and waits for the outstanding answers.
func (a *asker) run() {
	over := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() { a.writeLoop(over) })
	if a.readLoop() {
		late := time.NewTimer(a.s.cfg.Timeout + time.Second)
		defer late.Stop()
		for n := 0; n < askerPending; n++ {
			select {
			case a.slots <- struct{}{}:
				continue
			case <-a.s.exchange.over:
			case <-late.C:
			}
			break
		}
	}
	_ = a.f.Close()
	close(over)
	writer.Wait()
	t := &a.s.askers
	t.mu.Lock()
	delete(t.open, a)
	t.mu.Unlock()
}

// readLoop reads questions until the app ends its side, for which it returns true, or until there is an error.
func (a *asker) readLoop() (ended bool) {
	var length [2]byte
	buf := make([]byte, 0, 512)
	for {
		_ = a.f.SetReadDeadline(time.Now().Add(a.s.cfg.IdleClose)) // a file without deadlines is closed with Run
		if _, err := io.ReadFull(a.f, length[:]); err != nil {
			return err == io.EOF
		}
		n := int(binary.BigEndian.Uint16(length[:]))
		if n < headerLen {
			return false
		}
		var err error
		if buf, err = appendFrom(a.f, buf[:0], n); err != nil {
			return false
		}
		select {
		case a.slots <- struct{}{}:
		case <-a.s.exchange.over:
			return false
		}
		if !a.s.handle(buf, a.asked, byTCP, a.judge, nil, always(a.reply)) {
			return false
		}
		if cap(buf) > 4096 {
			buf = make([]byte, 0, 512)
		}
	}
}

// appendFrom appends n bytes from r to b. The buffer grows with what has arrived, because n is only the asker's
// claim.
func appendFrom(r io.Reader, b []byte, n int) ([]byte, error) {
	const step = 4 << 10
	for end := len(b) + n; len(b) < end; {
		had := len(b)
		b = slices.Grow(b, min(end-had, step))
		b = b[:min(end, cap(b))]
		if _, err := io.ReadFull(r, b[had:]); err != nil {
			return b, err
		}
	}
	return b, nil
}

func (a *asker) reply(b []byte) {
	if a.seen != nil {
		a.seen(b)
	}
	a.out <- append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(b)), uint16(len(b))), b...)
}

func (a *asker) writeLoop(over <-chan struct{}) {
	for {
		select {
		case <-over:
			return
		case b := <-a.out:
			_ = a.f.SetWriteDeadline(time.Now().Add(askerWrite))
			if _, err := a.f.Write(b); err != nil {
				_ = a.f.Close() // this ends the reader
			}
			<-a.slots
		}
	}
}
