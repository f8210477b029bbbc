package daemon

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// Lines that wait for whoever reads the log, how long a line waits to be one of them, and how long the end waits.
const (
	logLines = 1024
	logWait  = 100 * time.Millisecond
	logFlush = time.Second
)

// logQueue is a Writer that does not block for long, to one that may: a terminal that was stopped, a pipe that nobody
// reads. When the queue is full a line waits a moment, so that one who reads loses nothing; from then on until the next
// is read, what there is no room for is lost and counted.
type logQueue struct {
	lines      chan []byte
	stuck      atomic.Bool
	lost       atomic.Uint64
	stop, done chan struct{}
}

// newLogQueue needs to be closed. out is used until then, and after that where it was stuck.
func newLogQueue(out io.Writer) *logQueue {
	q := &logQueue{lines: make(chan []byte, logLines), stop: make(chan struct{}), done: make(chan struct{})}
	go q.run(out)
	return q
}

// Write takes one line.
func (q *logQueue) Write(p []byte) (int, error) {
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

func (q *logQueue) run(out io.Writer) {
	defer close(q.done)
	write := func(line []byte) {
		_, _ = out.Write(line) // there is nobody to tell
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

// close waits a little until everything is written. What is written to the queue afterwards is lost.
func (q *logQueue) close() {
	close(q.stop)
	t := time.NewTimer(logFlush)
	defer t.Stop()
	select {
	case <-q.done:
	case <-t.C:
	}
}
