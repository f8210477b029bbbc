package socks

import "time"

// health is what is known of one server of a group: whether it is used, and which requests it cannot carry. It has no clock of
// its own: each call is told what time it is. Who uses it holds a lock.
//
//	up ──fault, FailThreshold of them within FailWindow──> down ──RetryAfter──> one trial ──passed──> up, on probation
//	                                                         ^                     │ failed                  │ first fault
//	                                                         └─────────────────────┴─────────────────────────┘
//
// A success at any time makes the server up and clears the count of its faults.
type health struct {
	faults    []time.Duration // when, the oldest first; no more than FailThreshold
	isDown    bool
	probation bool // a trial has passed, and no request since
	trying    bool // a trial is under way
	retryAt   time.Duration
	why       error // the last fault

	// Requests that ended without an answer, since the last one that had one.
	ended, silent quietRequests
	answered      time.Duration // when the server last answered a request in whatever way

	unable    [numKinds]time.Duration // until when it is taken as unable to carry a kind of request
	noAnswers int                     // requests for an association in a row that ended with FIN
}

// kind is what a server may be unable to do: a command, and for CONNECT an address type.
type kind uint8

const (
	connect4 kind = iota
	connect6
	connectName
	associates
	numKinds
)

func kindOf(cmd Command, dst Addr) kind {
	switch {
	case cmd == CmdAssociate:
		return associates
	case dst.Name != "":
		return connectName
	case dst.IP.Is4() || dst.IP.Is4In6():
		return connect4
	}
	return connect6
}

const (
	// unableFor is how long a reply 7 or 8 is remembered: a server that was given UDP or IPv6 is used for it a minute later.
	unableFor = time.Minute
	// fromEndedOn is after how many requests to different targets, all of which ended with FIN, the server is at fault.
	fromEndedOn = 8
	// fromSilentOn is the same for requests that had no answer within the handshake timeout.
	fromSilentOn = 3
	// endedAssociate is how many ASSOCIATEs that end with FIN mean that the server has no UDP.
	endedAssociate = 3
)

// quietRequests counts requests for different targets that had no answer.
type quietRequests struct {
	count, targets int
	last           uint64
}

func (q *quietRequests) add(target uint64) {
	if q.count++; target != q.last {
		q.targets++
	}
	q.last = target
}

// most reports whether n requests, and not all to one target, had no answer.
func (q *quietRequests) most(n int) bool { return q.count >= n && q.targets > 1 }

// fault counts a fault. It reports whether the server went down by it.
func (h *health) fault(o *GroupOptions, now time.Duration, why error) (wentDown bool) {
	h.why = why
	if h.isDown {
		return false // an attempt from before: the time of the next trial stands
	}
	for len(h.faults) > 0 && now-h.faults[0] > o.FailWindow {
		h.faults = h.faults[1:]
	}
	if h.faults = append(h.faults, now); len(h.faults) < o.FailThreshold && !h.probation {
		return false
	}
	h.faults, h.probation = nil, false
	h.isDown, h.retryAt = true, now+o.RetryAfter
	return true
}

// success clears the count. It reports whether the server came up by it.
func (h *health) success(now time.Duration) (cameUp bool) {
	cameUp = h.isDown
	h.faults, h.isDown, h.probation, h.why = nil, false, false, nil
	h.heard(now)
	return cameUp
}

// heard notes an answer of the server, whatever it was.
func (h *health) heard(now time.Duration) {
	h.answered = now
	h.ended, h.silent = quietRequests{}, quietRequests{}
}

// due reports whether a trial is to begin. soon: no server of the group is up, so that RetryAfter is not waited for.
func (h *health) due(now time.Duration, soon bool) bool {
	return h.isDown && !h.trying && (soon || now >= h.retryAt)
}

// tried ends a trial. It reports whether the server came up by it.
func (h *health) tried(o *GroupOptions, now time.Duration, err error) (cameUp bool) {
	h.trying = false
	if !h.isDown { // a success of an attempt from before came first
		return false
	}
	if err != nil {
		h.why, h.retryAt = err, now+o.RetryAfter
		return false
	}
	h.faults, h.isDown, h.probation, h.why = nil, false, true, nil
	h.ended, h.silent = quietRequests{}, quietRequests{}
	h.unable = [numKinds]time.Duration{} // it may be another server now
	h.noAnswers = 0
	return true
}

// canDo reports whether nothing is known that speaks against asking the server for k.
func (h *health) canDo(k kind, now time.Duration) bool { return now >= h.unable[k] }

// cannot notes that the server carries no requests of the command or address type of k.
func (h *health) cannot(k kind, r Reply, now time.Duration) {
	h.unable[k] = now + unableFor
	if r == ReplyCommandNotSupported && k != associates {
		h.unable[connect4], h.unable[connect6], h.unable[connectName] = h.unable[k], h.unable[k], h.unable[k]
	}
}
