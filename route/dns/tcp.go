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
	maxAskers    = 256              // connections of the app at a time
	askerPending = 32               // questions of one connection that wait for an answer; it is read no further meanwhile
	askerWrite   = 10 * time.Second // for the app to take an answer
)

// askers are the open connections of the app.
type askers struct {
	mu   sync.Mutex
	open map[*asker]struct{}
	over bool
	wg   sync.WaitGroup
}

// asker is a connection that the app asks by: RFC 7766. Questions may come before the answers to those before them, and the
// answers come in the order in which they are found.
type asker struct {
	s     *Server
	f     *os.File
	asked netip.AddrPort
	judge Judge
	seen  func(answer []byte)
	slots chan struct{} // one for each question without a written answer
	out   chan []byte   // as long: an answer never waits for room
}

// ServeTCP answers the questions that come by fd, a connected and non-blocking stream socket that it owns from here on. It does
// not block, and ends the connection when it is idle, when what comes is no question, when there are too many connections, and
// with Run. asked is as in Handle, and judge as in HandleJudged. seen gets each answer before the app does, from any goroutine,
// and keeps nothing; nil: nobody wants them.
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

// run reads until there is nothing more to read, and waits for the answers that are still to come.
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

// readLoop takes questions until the app ends its side, and then returns true, or something is wrong.
func (a *asker) readLoop() (ended bool) {
	var length [2]byte
	buf := make([]byte, 0, 512)
	for {
		_ = a.f.SetReadDeadline(time.Now().Add(a.s.cfg.IdleClose)) // a file that can't have one is closed with Run
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
		if !a.s.handle(buf, a.asked, byTCP, a.judge, nil, a.reply) {
			return false
		}
		if cap(buf) > 4096 {
			buf = make([]byte, 0, 512)
		}
	}
}

// appendFrom reads n bytes to the end of b. The buffer grows with what has come, since n is only what the asker claims.
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
				_ = a.f.Close() // which ends the reader
			}
			<-a.slots
		}
	}
}
