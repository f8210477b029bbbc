package process

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// The number of lines that wait for the reader of the log, how long a line waits for room among them, and how long
// the end waits.
const (
	logLines = 1024
	logWait  = 100 * time.Millisecond
	logFlush = time.Second
)

// LogQueue is a Writer that does not block for long, in front of one that may: a stopped terminal, or a pipe that
// nobody reads. When the queue is full, a line waits briefly, so that a slow reader loses nothing. From then on until
// the next line is read, lines for which there is no room are dropped and counted.
type LogQueue struct {
	lines      chan []byte
	stuck      atomic.Bool
	lost       atomic.Uint64
	stop, done chan struct{}
}

// NewLogQueue returns a queue that the caller must close. It writes to out until then, and afterwards only if a write
// was stuck.
func NewLogQueue(out io.Writer) *LogQueue {
	q := &LogQueue{lines: make(chan []byte, logLines), stop: make(chan struct{}), done: make(chan struct{})}
	go q.run(out)
	return q
}

// Write accepts one line.
func (q *LogQueue) Write(p []byte) (int, error) {
	line := bytes.Clone(p)
	select {
	case q.lines <- line:
		return len(p), nil
	default:
	}
	if !q.stuck.Load() {
		t := time.NewTimer(logWait)
		defer t.Stop()
		select {
		case q.lines <- line:
			return len(p), nil
		case <-t.C:
			q.stuck.Store(true)
		}
	}
	q.lost.Add(1)
	return len(p), nil
}

func (q *LogQueue) run(out io.Writer) {
	defer close(q.done)
	write := func(line []byte) {
		_, _ = out.Write(line) // a failed write cannot be reported
		q.stuck.Store(false)
		if n := q.lost.Swap(0); n > 0 {
			fmt.Fprintf(
				out,
				"time=%s level=WARN msg=\"lines of the log are lost: they were not read\" count=%d\n",
				time.Now().UTC().Format("2006-01-02T15:04:05.000Z07:00"),
				n,
			)
		}
	}
	for {
		select {
		case line := <-q.lines:
			write(line)
		case <-q.stop:
			for len(q.lines) > 0 {
				write(<-q.lines)
			}
			return
		}
	}
}

// Close waits briefly until everything is written. Later writes to the queue are lost.
func (q *LogQueue) Close() {
	close(q.stop)
	t := time.NewTimer(logFlush)
	defer t.Stop()
	select {
	case <-q.done:
	case <-t.C:
	}
}
