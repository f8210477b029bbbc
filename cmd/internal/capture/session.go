package capture

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/flow"
)

const (
	// queueBytes and queueLen bound what waits to be written. What exceeds them is dropped and counted.
	queueBytes = 16 << 20
	queueLen   = 16_384
	// settle is how long a packet waits until it is written: the verdict on its flow, its program, or its end come meanwhile.
	settle = 100 * time.Millisecond
	// maxFlows bounds the flows that are remembered. Those that exceed it have no comments.
	maxFlows  = 16_384
	tidyEvery = time.Second
	// writeSize is how much is written at a time at least, unless there is less.
	writeSize = 64 << 10
	// maxRest bounds the comments at the end, on flows that ended without a packet.
	maxRest = 256
)

// Session is one capture.
type Session struct {
	filter Filter
	dst    destination
	now    func() time.Time

	mu     sync.Mutex // the data plane takes it: nobody holds it for longer than a few instructions
	queue  []Packet
	spare  []Packet
	length int    // packets that are not written yet
	bytes  int    // of them
	lost   uint64 // since the last packet in the queue
	closed bool

	flowsMu sync.Mutex
	flows   map[tuple]*known
	tidied  time.Time // when flows that have ended were last forgotten

	// Of the goroutine of Run.
	waiting          []Packet // that were taken from the queue, and settle
	dropped, written uint64
}

// known is what is known of a flow.
type known struct {
	flow    control.Flow
	err     string
	seen    bool   // a packet of it was written
	comment string // that was written last
}

// New checks the filter.
func New(f Filter) (*Session, error) {
	if err := f.Check(); err != nil {
		return nil, err
	}
	d, err := parseDestination(f.Destination)
	if err != nil {
		return nil, err
	}
	return &Session{filter: f, dst: d, now: time.Now, flows: map[tuple]*known{}}, nil
}

// Saw takes a packet, whose parts are lent for the call. Any goroutine. It does not wait for whoever reads.
func (s *Session) Saw(parts [][]byte, toApp bool) {
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	if !s.reserve(size) {
		return
	}
	p := Packet{At: s.now(), Data: make([]byte, 0, size), ToApp: toApp}
	for _, part := range parts {
		p.Data = append(p.Data, part...)
	}
	s.mu.Lock()
	p.Before, s.lost = s.lost, 0
	s.queue = append(s.queue, p)
	s.mu.Unlock()
}

// reserve reports whether there is room for a packet, and takes it.
func (s *Session) reserve(size int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if s.bytes+size > queueBytes || s.length >= queueLen {
		s.lost++
		return false
	}
	s.bytes += size
	s.length++
	return true
}

// Know takes what has happened to flows, or what there are.
func (s *Session) Know(events []control.Event) {
	s.flowsMu.Lock()
	defer s.flowsMu.Unlock()
	for i := range events {
		f := events[i].Flow
		if f == nil {
			continue
		}
		t, ok := tupleOfFlow(f)
		if !ok {
			continue
		}
		k := s.flows[t]
		switch {
		case k == nil && len(s.flows) >= maxFlows && !s.forget():
			continue
		case k == nil || k.flow.ID != f.ID:
			k = &known{}
			s.flows[t] = k
		}
		k.flow, k.err = *f, events[i].Error
	}
}

// forget forgets flows that have ended, to make room. It looks at all of them, so it does that only now and then.
func (s *Session) forget() (room bool) {
	if now := s.now(); now.Sub(s.tidied) >= tidyEvery {
		s.tidied = now
		maps.DeleteFunc(s.flows, func(_ tuple, k *known) bool { return ended(k.flow.State) })
	}
	return len(s.flows) < maxFlows
}

// ended reports whether a state is that of a flow that is over.
func ended(state string) bool { return state != "dialing" && state != "open" && state != "retrying" }

func tupleOfFlow(f *control.Flow) (t tuple, ok bool) {
	src, err := netip.ParseAddrPort(f.Src)
	if err != nil {
		return t, false
	}
	dst, err := netip.ParseAddrPort(f.Dst)
	if err != nil {
		return t, false
	}
	switch f.Proto {
	case flow.TCP.String():
		t.proto = flow.TCP
	case flow.UDP.String():
		t.proto = flow.UDP
	default:
		return t, false
	}
	t.src, t.dst = src, dst
	return t.flow(), true
}

// Run writes what is captured to w, until a limit is reached, ctx ends or w fails.
func (s *Session) Run(ctx context.Context, w io.Writer, application, device string) error {
	defer s.close()
	buffered := bufio.NewWriterSize(w, writeSize)
	out, err := NewWriter(buffered, application, device, s.describe())
	if err == nil {
		err = buffered.Flush()
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.filter.Time)
	defer cancel()
	tick := time.NewTicker(settle / 4)
	defer tick.Stop()
	left := s.filter.Bytes
	for over := false; !over; {
		select {
		case <-ctx.Done():
			over = true
		case <-tick.C:
		}
		for _, p := range s.take(over) {
			s.dropped += p.Before
			comment, wanted := s.judge(&p)
			if !wanted {
				continue
			}
			if left -= int64(len(p.Data)); left < 0 || s.written >= uint64(s.filter.Count) {
				over = true
				break
			}
			if err := out.Packet(&p, comment); err != nil {
				return err
			}
			s.written++
		}
		over = over || s.written >= uint64(s.filter.Count)
		if err := buffered.Flush(); err != nil {
			return err
		}
	}
	if err := out.Stats(s.now(), s.written, s.dropped, s.rest()); err != nil {
		return err
	}
	return buffered.Flush()
}

// describe is the comment of the file.
func (s *Session) describe() string {
	words := []string{"what crossed the TUN of viasocks"}
	if s.filter.Flow != 0 {
		words = append(words, fmt.Sprintf("flow %d", s.filter.Flow))
	}
	if s.filter.Program != "" {
		words = append(words, "program "+control.Plain(s.filter.Program))
	}
	if s.filter.Destination != "" {
		words = append(words, "destination "+control.Plain(s.filter.Destination))
	}
	return strings.Join(words, ", ")
}

// take takes the packets that have waited long enough, or all. They are valid until the next call.
func (s *Session) take(all bool) (ready []Packet) {
	s.mu.Lock()
	came := s.queue
	s.queue, s.spare = s.spare[:0], nil
	if all {
		s.dropped += s.lost
		s.lost = 0
	}
	s.mu.Unlock()
	s.waiting = append(s.waiting, came...)
	clear(came)
	n := len(s.waiting)
	if !all {
		old := s.now().Add(-settle)
		n = slices.IndexFunc(s.waiting, func(p Packet) bool { return p.At.After(old) })
		if n < 0 {
			n = len(s.waiting)
		}
	}
	ready = s.waiting[:n]
	s.waiting = slices.Clone(s.waiting[n:])
	size := 0
	for i := range ready {
		size += len(ready[i].Data)
	}
	s.mu.Lock()
	s.spare = came
	s.bytes -= size
	s.length -= n
	s.mu.Unlock()
	return ready
}

// judge reports whether a packet is wanted, and gives the comment that belongs to it: whenever something is new about its flow.
func (s *Session) judge(p *Packet) (comment string, wanted bool) {
	t, ok := tupleOf(p.Data, p.ToApp)
	s.flowsMu.Lock()
	defer s.flowsMu.Unlock()
	k := &known{}
	if found := s.flows[t.flow()]; ok && found != nil {
		k = found
	}
	f := &k.flow
	switch {
	case s.filter.Flow != 0 && f.ID != s.filter.Flow,
		s.filter.Program != "" && !isProgram(f, s.filter.Program),
		s.filter.Destination != "" && (!ok || !s.dst.matches(t.dst, f.Host)):
		return "", false
	}
	k.seen = true
	if text := k.text(); text != k.comment {
		k.comment = text
		return text, true
	}
	return "", true
}

// rest are comments on flows that have ended since their last packet was written.
func (s *Session) rest() (comments []string) {
	s.flowsMu.Lock()
	defer s.flowsMu.Unlock()
	for _, k := range s.flows {
		if text := k.text(); k.seen && text != k.comment && len(comments) < maxRest {
			comments = append(comments, text)
		}
	}
	slices.Sort(comments)
	return comments
}

// text is the comment on a flow; empty: nothing is known of it.
func (k *known) text() string {
	f := &k.flow
	if f.ID == 0 {
		return ""
	}
	to := f.Dst
	if f.Host != "" {
		to = fmt.Sprintf("%s (%s)", control.Plain(f.Host), f.Dst)
	}
	text := fmt.Sprintf("flow %d: %s to %s, ", f.ID, f.Proto, to)
	if f.PID != 0 {
		text += fmt.Sprintf("program %s (process %d), ", control.Plain(f.Exe), f.PID)
	}
	if f.Upstream != "" {
		text += "upstream " + f.Upstream + ", "
	}
	text += "rule " + control.Plain(f.Rule) + ", " + f.State
	if ended(f.State) {
		text += fmt.Sprintf(", %d bytes up, %d down", f.Up, f.Down)
	}
	if k.err != "" {
		text += ": " + control.Plain(k.err)
	}
	return text[:min(len(text), MaxComment)]
}

// close refuses packets from now on.
func (s *Session) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed, s.queue, s.spare = true, nil, nil
}
