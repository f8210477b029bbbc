package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// The kinds of an Event.
const (
	EventOpened      = "opened"      // an upstream is asked for the flow; UDP: the mapping was made
	EventDialled     = "dialled"     // TCP: the upstream granted it
	EventEstablished = "established" // TCP: the program is connected; UDP: the association was made
	EventClosed      = "closed"      // the flow has ended; its state tells how
	EventLost        = "lost"        // this watcher was too slow: Lost events are missing here
)

// Event is what happened to a flow.
type Event struct {
	Event string    `json:"event"`
	Time  time.Time `json:"time"`
	*Flow
	Error string `json:"error,omitempty"` // closed: why, if it did not end in order
	Lost  uint64 `json:"lost,omitempty"`
}

const (
	// maxWatchers limits the concurrent watchers. It is lower than the limit of connections, so that other requests are
	// still served.
	maxWatchers = 8
	// maxEvent limits a line of the stream.
	maxEvent = 64 << 10
)

// watchPatience is how long a watcher may read nothing before it is disconnected. Only tests change it.
var watchPatience = answerTimeout

var errManyWatchers = fmt.Errorf("there are %d watchers already", maxWatchers)

// watch answers with a JSON object on a line for each event, until the watcher goes away or the Server is closed.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	p, _ := r.Context().Value(peerKey{}).(privsock.Peer)
	if !p.Owner() && !p.In(s.o.Group) {
		s.refuse(w, p, mayLook)
		return
	}
	n := s.watchers(p)
	defer n.Add(-1)
	if n.Add(1) > maxWatchers {
		http.Error(w, errManyWatchers.Error(), http.StatusServiceUnavailable)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(s.closing, cancel)()
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Time{}) // the deadline of the request must not end the stream
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	flush := func() error {
		if err := rc.SetWriteDeadline(time.Now().Add(watchPatience)); err != nil {
			return err
		}
		return rc.Flush()
	}
	if flush() != nil {
		return
	}
	s.o.Backend.Watch(ctx, func(events []Event) error {
		if err := rc.SetWriteDeadline(time.Now().Add(watchPatience)); err != nil {
			return err
		}
		for i := range events {
			if err := e.Encode(&events[i]); err != nil {
				return err
			}
		}
		return flush()
	})
}

// watchers returns the counter of watchers for p's kind, as slots does for connections.
func (s *Server) watchers(p privsock.Peer) *atomic.Int32 {
	if p.Owner() {
		return &s.ownersWatch
	}
	return &s.othersWatch
}

// ErrEnded means that the viasocks that was asked or watched has ended.
var ErrEnded = errors.New("viasocks has ended")

// ErrSlow means that viasocks has disconnected a watcher that did not read.
var ErrSlow = fmt.Errorf("cannot watch any longer: what viasocks sent was not read for %v: start the watcher again",
	watchPatience)

// Watch passes each event to f until ctx ends or f returns an error, which Watch then returns. If viasocks ends, Watch
// returns ErrEnded; if f was so slow that viasocks has given up, ErrSlow.
func (c *Client) Watch(ctx context.Context, f func(Event) error) error {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://viasocks/v1/watch", nil)
	if err != nil {
		return err
	}
	stream := c.http
	stream.Timeout = 0 // there may be no event for hours
	resp, err := stream.Do(req)
	if err != nil {
		if ctx.Err() != nil { // which closes the connection, and err may tell only of that
			return ctx.Err()
		}
		return c.explain(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return refusal("watch", resp)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxEvent)
	for lines.Scan() {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			if !lines.Scan() && lines.Err() != nil {
				break // the stream broke off in the middle of this line
			}
			return fmt.Errorf("cannot understand the answer of viasocks: %w", err)
		}
		if err := f(e); err != nil {
			return err
		}
	}
	switch err := lines.Err(); {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, bufio.ErrTooLong):
		return fmt.Errorf("cannot understand the answer of viasocks: %w", err)
	case err != nil:
		// The stream was broken off, and not ended: viasocks was killed, or it lives and has disconnected this watcher.
		if _, err := c.Status(); err == nil {
			return ErrSlow
		}
	}
	return ErrEnded
}
