package socks

import "time"

// health is what is known of one server of a group: whether it is in use, and which requests it cannot carry. It has
// no clock of its own; each method is given the time. The caller holds a lock.
//
//	up ──fault, FailThreshold of them within FailWindow──> down ──RetryAfter──> one trial ──passed──> up, on probation
//	                                                         ^                     │ failed                  │ first fault
//	                                                         └─────────────────────┴─────────────────────────┘
//
// A success at any time takes the server up and clears the count of its faults.
type health struct {
	faults    []time.Duration // times of the faults, oldest first, at most FailThreshold
	isDown    bool
	probation bool // a trial has passed, and no request has succeeded since
	trying    bool // a trial is in progress
	retryAt   time.Duration
	why       error // the last fault

	// Requests that ended without an answer since the last answered one.
	ended, silent quietRequests
	answered      time.Duration // when the server last answered any request

	unable    [numKinds]time.Duration // until when the server counts as unable to carry a kind of request
	noAnswers int                     // consecutive ASSOCIATEs that ended with FIN
}

// kind is something that a server may be unable to do: a command and, for CONNECT and BIND, an address type.
type kind uint8

const (
	connect4 kind = iota
	connect6
	connectName
	associates
	binds4
	binds6
	numKinds
)

func kindOf(cmd Command, dst Addr) kind {
	switch {
	case cmd == CmdAssociate:
		return associates
	case cmd == CmdBind && dst.IP.Is6() && !dst.IP.Is4In6():
		return binds6
	case cmd == CmdBind:
		return binds4
	case dst.Name != "":
		return connectName
	case dst.IP.Is4() || dst.IP.Is4In6():
		return connect4
	}
	return connect6
}

// binds reports whether k is BIND.
func (k kind) binds() bool { return k == binds4 || k == binds6 }

const (
	// unableFor is how long a reply 7 or 8 is remembered. A server that has been given UDP or IPv6 is used for it
	// within a minute.
	unableFor = time.Minute
	// fromEndedOn is the number of requests to different targets, all ended by FIN, from which on the server is at
	// fault.
	fromEndedOn = 8
	// fromSilentOn is the same for requests without an answer within the handshake timeout.
	fromSilentOn = 3
	// endedAssociate is the number of ASSOCIATEs ended by FIN that mean that the server has no UDP.
	endedAssociate = 3
)

// quietRequests counts requests to different targets that got no answer.
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

// most reports whether at least n requests got no answer, and they were not all to one target.
func (q *quietRequests) most(n int) bool { return q.count >= n && q.targets > 1 }

// fault counts a fault. It reports whether this took the server down.
func (h *health) fault(o *GroupOptions, now time.Duration, why error) (wentDown bool) {
	h.why = why
	if h.isDown {
		return false // an attempt from before: the time of the next trial does not change
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

// success clears the count of faults. It reports whether this took the server up.
func (h *health) success(now time.Duration) (cameUp bool) {
	cameUp = h.isDown
	h.faults, h.isDown, h.probation, h.why = nil, false, false, nil
	h.heard(now)
	return cameUp
}

// heard notes that the server has answered, whatever the answer was.
func (h *health) heard(now time.Duration) {
	h.answered = now
	h.ended, h.silent = quietRequests{}, quietRequests{}
}

// due reports whether a trial should begin. With soon, no server of the group is up and the trial does not wait for
// RetryAfter.
func (h *health) due(now time.Duration, soon bool) bool {
	return h.isDown && !h.trying && (soon || now >= h.retryAt)
}

// tried ends a trial. It reports whether this took the server up.
func (h *health) tried(o *GroupOptions, now time.Duration, err error) (cameUp bool) {
	h.trying = false
	if !h.isDown { // an earlier attempt has succeeded first
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

// canDo reports whether nothing speaks against asking the server for k.
func (h *health) canDo(k kind, now time.Duration) bool { return now >= h.unable[k] }

// cannot notes that the server does not carry the command or address type of k.
func (h *health) cannot(k kind, r Reply, now time.Duration) {
	h.unable[k] = now + unableFor
	switch {
	case r != ReplyCommandNotSupported || k == associates:
	case k.binds():
		h.unable[binds4], h.unable[binds6] = h.unable[k], h.unable[k]
	default:
		h.unable[connect4], h.unable[connect6], h.unable[connectName] = h.unable[k], h.unable[k], h.unable[k]
	}
}
