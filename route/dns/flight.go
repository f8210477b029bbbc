package dns

import (
	"sync"
	"time"
)

// flights are the questions that are on their way to a resolver, so that what is asked again meanwhile is not sent again: the
// first asker leads, and those who come later wait for its answer. Its methods may be called from any goroutine.
type flights struct {
	most int // askers that wait, of all flights together

	mu      sync.Mutex
	byKey   map[string]*flight
	waiting int
}

type flight struct {
	askers []waiter
	until  time.Time // the leader has an answer by then, or will not
}

// waiter is an asker beside the leader.
type waiter struct {
	head  []byte // of its message: the header and the question
	q     question
	reply func([]byte)
}

// role is what became of an asker.
type role uint8

const (
	leads   role = iota // it has to ask
	follows             // its reply is called with the answer to the one who leads
	tooMany             // it can do neither
)

// join lets an asker wait for the answer to a key, or lead until then.
func (f *flights) join(key []byte, msg []byte, q *question, reply func([]byte), now, until time.Time) role {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byKey == nil {
		f.byKey = make(map[string]*flight)
	}
	x := f.byKey[string(key)]
	switch {
	case x == nil || !now.Before(x.until): // the leader was dropped, and those who wait for it ask again by themselves
		if x != nil {
			f.waiting -= len(x.askers)
		}
		f.byKey[string(key)] = &flight{until: until}
		return leads
	case f.waiting >= f.most:
		return tooMany
	}
	f.waiting++
	x.askers = append(x.askers, waiter{append([]byte(nil), msg[:q.end]...), *q, reply})
	return follows
}

// land ends the flight of a key and returns those who wait for its answer.
func (f *flights) land(key string) []waiter {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.byKey[key]
	if x == nil {
		return nil
	}
	delete(f.byKey, key)
	f.waiting -= len(x.askers)
	return x.askers
}
