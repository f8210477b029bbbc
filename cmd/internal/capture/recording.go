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
	// queueBytes and queueLen limit the queue. Further packets are dropped and counted.
	queueBytes = 16 << 20
	queueLen   = 16_384
	// settle is the time for which a packet waits before it is written. Meanwhile, the verdict on its flow, its program
	// or its end becomes known.
	settle = 100 * time.Millisecond
	// maxFlows limits the flows that are remembered. Further flows get no comments.
	maxFlows  = 16_384
	tidyEvery = time.Second
	// writeSize is the minimum size of a write, unless less is available.
	writeSize = 64 << 10
	// maxRest limits the comments at the end on flows that ended without a further packet.
	maxRest = 256
)

// Recording is one capture.
type Recording struct {
	filter Filter
	dst    destination
	now    func() time.Time

	mu     sync.Mutex // the data plane takes it, so it is only held for a few instructions
	queue  []Packet
	spare  []Packet
	length int    // number of packets that are not written yet
	bytes  int    // their size
	lost   uint64 // since the last packet in the queue
	closed bool

	flowsMu sync.Mutex
	flows   map[tuple]*known
	tidied  time.Time // when ended flows were last forgotten

	// Used only by the goroutine of Run.
	waiting          []Packet // taken from the queue, waiting for settle
	dropped, written uint64
}

// known is what is known about a flow.
type known struct {
	flow    control.Flow
	err     string
	seen    bool   // one of its packets was written
	comment string // the last one that was written
}

// New checks the filter and returns a Recording.
func New(f Filter) (*Recording, error) {
	if err := f.Check(); err != nil {
		return nil, err
	}
	d, err := parseDestination(f.Destination)
	if err != nil {
		return nil, err
	}
	return &Recording{filter: f, dst: d, now: time.Now, flows: map[tuple]*known{}}, nil
}

// Saw queues a packet. It copies the parts, never waits for the reader, and may be called from any goroutine.
func (s *Recording) Saw(parts [][]byte, toApp bool) {
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

// reserve reserves room for a packet. It returns false if there is none.
func (s *Recording) reserve(size int) bool {
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

// Know takes events of flows, or a list of the current flows.
func (s *Recording) Know(events []control.Event) {
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

// forget makes room by forgetting ended flows. It walks over all flows and therefore does so only from time to time.
func (s *Recording) forget() (room bool) {
	if now := s.now(); now.Sub(s.tidied) >= tidyEvery {
		s.tidied = now
		maps.DeleteFunc(s.flows, func(_ tuple, k *known) bool { return ended(k.flow.State) })
	}
	return len(s.flows) < maxFlows
}

// ended reports whether a state is that of an ended flow.
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

// Run writes the captured packets to w until a limit is reached, ctx ends or w fails.
func (s *Recording) Run(ctx context.Context, w io.Writer, application, device string) error {
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

// describe returns the comment of the file.
func (s *Recording) describe() string {
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

// take returns the packets that have waited long enough, or all. They are valid until the next call.
func (s *Recording) take(all bool) (ready []Packet) {
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

// judge reports whether a packet matches the filter, and returns a comment if there is something new to say about its
// flow.
func (s *Recording) judge(p *Packet) (comment string, wanted bool) {
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

// rest returns comments on the flows that have ended since their last packet was written.
func (s *Recording) rest() (comments []string) {
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

// text returns the comment on a flow. It is empty if nothing is known about the flow.
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

// close makes Saw refuse further packets.
func (s *Recording) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed, s.queue, s.spare = true, nil, nil
}
