package control

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// The connection of a takeover begins as a request and then changes its protocol (RFC 9110, section 7.8), because it
// carries descriptors.

const takeoverProtocol = "viasocks-takeover"

// takeover gives the connection of a client that may do everything to the Backend.
func (s *Server) takeover(w http.ResponseWriter, r *http.Request) {
	p, _ := r.Context().Value(peerKey{}).(privsock.Peer)
	if !p.Owner() {
		s.refuse(w, p)
		return
	}
	if r.Header.Get("Upgrade") != takeoverProtocol {
		http.Error(w, "this request needs the header Upgrade: "+takeoverProtocol, http.StatusUpgradeRequired)
		return
	}
	raw, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	c, ok := raw.(*conn)
	if !ok {
		raw.Close()
		return
	}
	s.o.Log.Info("control", "request", r.Method+" "+r.URL.Path, "uid", p.UID, "pid", p.PID)
	c.slots.Add(-1) // it is no connection of the server any more
	c.once.Do(func() {})
	_ = c.SetDeadline(time.Now().Add(answerTimeout))
	_, err = io.WriteString(c.UnixConn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"+
		"Upgrade: "+takeoverProtocol+"\r\n\r\n")
	if err != nil {
		c.UnixConn.Close()
		return
	}
	s.o.Backend.TakeOver(c.UnixConn, int(p.PID))
}

// TakeOver asks the viasocks at path to hand the host over. The caller closes the connection, over which the two
// continue as package handover describes. ErrNoDaemon means that none is up.
func TakeOver(path string) (*net.UnixConn, error) {
	cl := NewClient(path)
	defer cl.Close()
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	raw, err := cl.dial(ctx)
	if err != nil {
		return nil, cl.explain(err)
	}
	c, ok := raw.(*net.UnixConn)
	if !ok {
		raw.Close()
		return nil, errors.New("cannot take over: the control socket is no unix socket")
	}
	fail := func(err error) (*net.UnixConn, error) {
		c.Close()
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(clientTimeout))
	req, err := http.NewRequest("POST", "http://viasocks/v1/takeover", nil)
	if err != nil {
		return fail(err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", takeoverProtocol)
	if err := req.Write(c); err != nil {
		return fail(cl.explain(err))
	}
	// The other side sends its descriptors only after this answer, so they must not be read by the buffered reader.
	resp, err := http.ReadResponse(bufio.NewReader(&oneByte{c}), req)
	if err != nil {
		return fail(cl.explain(err))
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		return fail(refusal("takeover", resp))
	}
	return c, nil
}

// oneByte reads one byte at a time, so that nothing after the header is read.
type oneByte struct{ c net.Conn }

func (o *oneByte) Read(b []byte) (int, error) { return o.c.Read(b[:min(len(b), 1)]) }
