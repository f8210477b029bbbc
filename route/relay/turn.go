package relay

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// canUp reports whether there may be data to read from the app, and the socket may accept it.
func (r *Relay) canUp() bool {
	if r.over || r.upDone || r.Got&sockOut == 0 {
		return false
	}
	if r.rst != nil && (!r.rst.byApp || r.rst.dry && len(r.spill) == 0) {
		return false
	}
	return len(r.spill) > 0 || r.upFIN || r.Got&appIn != 0
}

// canDown reports whether there may be data to read from the socket, and the app's stream may accept it.
func (r *Relay) canDown() bool {
	if r.over || r.downDone || r.rst != nil && (r.rst.byApp || r.rst.dry) {
		return false
	}
	return r.Got&sockIn != 0 && r.Got&appOut != 0
}

// moveUp moves up to turnBytes from the app to the socket.
func (r *Relay) moveUp() {
	if len(r.spill) > 0 && !r.sendSpill() {
		return
	}
	w := &r.l.w
	w.start(int(r.fd))
	var err error
	total := 0
	for err == nil && !r.upFIN && !w.stopped() {
		var n int
		n, err = r.app.ReadTo(w)
		total += n
		if n == 0 && err == nil && !w.stopped() { // a stream that gives neither data nor an error must not spin the loop
			err = flow.ErrAgain
		}
	}
	w.flush()
	if total > 0 {
		r.up.Add(uint64(total))
	}
	if w.again {
		r.Got &^= sockOut
	}
	if w.err != 0 {
		r.upstreamReset(w.err)
		return
	}
	if len(w.buf) > 0 {
		r.spill = append([]byte(nil), w.buf...)
	}
	switch {
	case err == nil:
	case errors.Is(err, flow.ErrAgain):
		r.Got &^= appIn
	case errors.Is(err, io.EOF):
		r.Got &^= appIn
		r.upFIN = true
		if r.rst != nil {
			r.rst.dry = true
		}
	default:
		r.Got &^= appIn
		if r.rst == nil {
			r.appReset(err)
		}
		r.rst.dry = true // the rest is in spill and in the socket
		return
	}
	if r.upFIN && len(r.spill) == 0 {
		r.passUpFIN()
	}
}

// sendSpill sends what the socket did not take last time. It returns false if some of it is left or the socket failed.
func (r *Relay) sendSpill() bool {
	n, e := send(int(r.fd), r.spill)
	if e == unix.EAGAIN || e == 0 && n < len(r.spill) {
		r.Got &^= sockOut
	} else if e != 0 {
		r.upstreamReset(e)
		return false
	}
	if r.spill = r.spill[n:]; len(r.spill) > 0 {
		return false
	}
	r.spill = nil
	return true
}

// passUpFIN half-closes the socket.
func (r *Relay) passUpFIN() {
	if r.rst != nil { // the app's RST came after its FIN
		return
	}
	if err := loop.CloseWrite(int(r.fd)); err != nil {
		e := sockError(int(r.fd)) // ENOTCONN: it was reset
		if e == 0 {
			e = unix.ECONNRESET
		}
		r.upstreamReset(e)
		return
	}
	r.upDone = true
}

// moveDown moves up to the budget of a turn from the socket to the app.
func (r *Relay) moveDown() {
	fd := int(r.fd)
	p := &r.l.p
	budget := turnBytes
	if r.l.Crowded() {
		budget = crowdBytes
	}
	for budget > 0 {
		n := unread(fd)
		if n == 0 {
			if r.Got&sockHup == 0 { // what comes from now on is a new edge
				r.Got &^= sockIn
				return
			}
			if r.downEnd() {
				return
			}
			continue
		}
		want := min(n, chunk, budget)
		p.fd, p.left, p.given = fd, want, 0
		k, err := r.app.WriteFrom(p)
		if k > 0 {
			r.down.Add(uint64(k))
			budget -= k
		}
		if k < p.given {
			r.finish(ErrLost)
			return
		}
		switch {
		case err == nil:
			if k == 0 { // a stream that neither takes data nor returns an error must not spin the loop
				r.Got &^= appOut
				return
			}
		case errors.Is(err, flow.ErrAgain):
			r.Got &^= appOut
			return
		default:
			r.appBroke(err)
			return
		}
		if k == n && r.Got&sockHup == 0 { // that was everything
			r.Got &^= sockIn
			return
		}
	}
}

// downEnd is called when the receive queue is empty and FIN or RST was seen. It returns false if there is data after
// all.
func (r *Relay) downEnd() bool {
	var b [1]byte
	n, e := recv(int(r.fd), b[:], unix.MSG_PEEK)
	switch {
	case e == unix.EAGAIN:
		r.Got &^= sockIn
		return true
	case n > 0:
		return false
	}
	r.Got &^= sockIn // EPOLLERR reports a RST after the FIN
	if e != 0 {
		r.upstreamReset(e)
	}
	if r.rst != nil {
		r.rst.dry = true
		return true
	}
	if err := r.app.CloseWrite(); err != nil {
		r.appBroke(err)
		return true
	}
	r.downDone = true
	return true
}

// appBroke handles a failed write to the app's stream. There may still be something to read.
func (r *Relay) appBroke(err error) {
	r.Got &^= appOut
	r.appReset(err)
}

// probeApp finds out whether Hup meant a RST if neither direction would show it: the upstream accepts no data or the
// app's FIN was read, and nothing comes down.
func (r *Relay) probeApp() {
	if r.rst != nil && r.rst.byApp {
		return
	}
	if _, err := r.app.ReadTo(refuseWriter{}); err != nil && !errors.Is(err, flow.ErrAgain) && !errors.Is(err, io.EOF) {
		r.appReset(err)
		if !r.over {
			r.rst.dry = true
		}
		return
	}
	if _, err := r.app.WriteFrom(noPayload{}); errors.Is(err, flow.ErrReset) {
		r.appReset(err)
	}
}
