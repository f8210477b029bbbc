package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// The connections of a takeover and of an upgrade begin as a request and then change their protocol (RFC 9110, section 7.8):
// a takeover sends descriptors, and during an upgrade the server ends before the answer.

const (
	takeoverProtocol = "viasocks-takeover"
	upgradeProtocol  = "viasocks-upgrade"
)

// upgradeTimeout is how long a client waits for the outcome of an upgrade. The daemon limits an upgrade to less.
const upgradeTimeout = 2 * time.Minute

// upgraded is the answer to the request for an upgrade.
type upgraded struct {
	PID   int    `json:"pid,omitempty"`
	Error string `json:"error,omitempty"`
}

// takeover gives the connection of a client that may do everything to the Backend.
func (s *Server) takeover(w http.ResponseWriter, r *http.Request) {
	if c, p := s.hijack(w, r, takeoverProtocol); c != nil {
		s.o.Backend.TakeOver(c, int(p.PID))
	}
}

// upgrade answers with the outcome of an upgrade.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) {
	c, _ := s.hijack(w, r, upgradeProtocol)
	if c == nil {
		return
	}
	defer c.Close()
	var u upgraded
	var err error
	if u.PID, err = s.o.Backend.Upgrade(); err != nil {
		u = upgraded{Error: err.Error()}
	}
	_ = c.SetDeadline(time.Now().Add(answerTimeout))
	_ = json.NewEncoder(c).Encode(u) // the client may be gone
}

// hijack changes the protocol of the connection of a client that may do everything. The caller closes the connection. It is
// nil if hijack has refused the request, or if the client has ended.
func (s *Server) hijack(w http.ResponseWriter, r *http.Request, protocol string) (*net.UnixConn, privsock.Peer) {
	p, _ := r.Context().Value(peerKey{}).(privsock.Peer)
	if !p.Owner() {
		s.refuse(w, p, mayTouch)
		return nil, p
	}
	if r.Header.Get("Upgrade") != protocol {
		http.Error(w, "this request needs the header Upgrade: "+protocol, http.StatusUpgradeRequired)
		return nil, p
	}
	raw, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return nil, p
	}
	c, ok := raw.(*conn)
	if !ok {
		raw.Close()
		return nil, p
	}
	s.o.Log.Info("control", "request", r.Method+" "+r.URL.Path, "uid", p.UID, "pid", p.PID)
	c.slots.Add(-1) // it is no connection of the server any more
	c.once.Do(func() {})
	_ = c.SetDeadline(time.Now().Add(answerTimeout))
	_, err = io.WriteString(c.UnixConn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"+
		"Upgrade: "+protocol+"\r\n\r\n")
	if err != nil {
		c.UnixConn.Close()
		s.o.Log.Warn("nothing was done: the process that asked has ended", "request", r.Method+" "+r.URL.Path, "pid", p.PID)
		return nil, p
	}
	return c.UnixConn, p
}

// TakeOver asks the viasocks at path to hand the host over. The caller closes the connection, over which the two
// continue as package handover describes. ErrNoDaemon means that none is up.
func TakeOver(path string) (*net.UnixConn, error) {
	cl := NewClient(path)
	defer cl.Close()
	return cl.change("takeover", takeoverProtocol)
}

// Upgrade tells the daemon to start the program that is on disk now, and waits until the new process has taken the host over,
// for two minutes at most. It returns the process id of the new daemon. An error is ErrNoDaemon if none is up, and ErrOlder if
// the daemon does not know the request.
func (c *Client) Upgrade() (pid int, err error) {
	conn, err := c.change("upgrade", upgradeProtocol)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(upgradeTimeout))
	var u upgraded
	switch err := json.NewDecoder(io.LimitReader(conn, maxAnswer)).Decode(&u); {
	case err != nil:
		return 0, errors.New("cannot upgrade: viasocks has not answered: see its log, and 'viasocks status'")
	case u.Error != "":
		return 0, errors.New("cannot upgrade: " + u.Error)
	}
	return u.PID, nil
}

// change makes a request after which the connection has another protocol. The caller closes the connection.
func (cl *Client) change(request, protocol string) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	raw, err := cl.dial(ctx)
	if err != nil {
		return nil, cl.explain(err)
	}
	c, ok := raw.(*net.UnixConn)
	if !ok {
		raw.Close()
		return nil, errors.New("cannot ask for " + request + ": the control socket is no unix socket")
	}
	fail := func(err error) (*net.UnixConn, error) {
		c.Close()
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(clientTimeout))
	req, err := http.NewRequest("POST", "http://viasocks/v1/"+request, nil)
	if err != nil {
		return fail(err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", protocol)
	if err := req.Write(c); err != nil {
		return fail(cl.explain(err))
	}
	// The other side may send descriptors only after this answer, so they must not be read by the buffered reader.
	resp, err := http.ReadResponse(bufio.NewReader(&oneByte{c}), req)
	if err != nil {
		return fail(cl.explain(err))
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		return fail(refusal(request, resp))
	}
	return c, nil
}

// oneByte reads one byte at a time, so that nothing after the header is read.
type oneByte struct{ c net.Conn }

func (o *oneByte) Read(b []byte) (int, error) { return o.c.Read(b[:min(len(b), 1)]) }
