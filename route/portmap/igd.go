package portmap

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"
)

// The paths of the gateway (UPnP Device Architecture 1.0, section 2).
const (
	pathRoot                   = "/rootDesc.xml"
	pathIP, pathCIF            = "/WANIPConnection.xml", "/WANCommonInterfaceConfig.xml"
	pathControlIP, pathControl = "/control/ip", "/control/common"
)

const (
	// maxBody limits a request of SOAP. Real ones have less than 1 KiB.
	maxBody = 8 << 10
	// igdWait is how long a request waits for the proxy, and igdLook how often the Backend is asked meanwhile.
	igdWait, igdLook = 8 * time.Second, 20 * time.Millisecond
)

// ServeHTTP is the gateway of UPnP: its description, and the actions of its services. The caller sets RemoteAddr to the
// program's endpoint. A request may wait for the proxy, until its context ends.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !from.Addr().Is4() || !byAddress(r.Host) {
		http.Error(w, "Forbidden", http.StatusForbidden)
		return
	}
	w.Header().Set("Content-Type", `text/xml; charset="utf-8"`)
	control := r.Method == http.MethodPost
	switch {
	case control && r.URL.Path == pathControlIP:
		s.control(w, r, serviceIP, actionsIP, from.Addr())
	case control && r.URL.Path == pathControl:
		s.control(w, r, serviceCIF, actionsCIF, from.Addr())
	case control:
		http.NotFound(w, r)
	case r.URL.Path == pathRoot:
		_, _ = io.WriteString(w, s.description)
	case r.URL.Path == pathIP:
		_, _ = io.WriteString(w, scpdOf(actionsIP))
	case r.URL.Path == pathCIF:
		_, _ = io.WriteString(w, scpdOf(actionsCIF))
	default:
		http.NotFound(w, r)
	}
}

// byAddress reports whether a request names the gateway by its address. A web page that a browser in the namespace shows could
// otherwise reach the gateway by a name that it controls, and map ports.
func byAddress(host string) bool {
	_, err := netip.ParseAddrPort(host)
	if err != nil {
		_, err = netip.ParseAddr(host)
	}
	return err == nil
}

// control executes an action.
func (s *Server) control(w http.ResponseWriter, r *http.Request, service string, known []action, client netip.Addr) {
	c, err := readCall(http.MaxBytesReader(w, r.Body, maxBody))
	// A web page cannot set this header without the permission of the server, which never gives it.
	if err != nil || c.service != service || r.Header.Get("Soapaction") != `"`+service+"#"+c.name+`"` {
		s.mu.Lock()
		s.count.Malformed++
		s.mu.Unlock()
		writeFault(w, errInvalidAction)
		return
	}
	a := find(known, c.name)
	if a == nil {
		writeFault(w, errInvalidAction)
		return
	}
	for _, name := range a.in {
		if _, ok := c.args[name]; !ok {
			writeFault(w, errInvalidArgs)
			return
		}
	}
	out, err := s.wait(r, &request{args: c.args, client: client, action: a})
	var fault igdError
	switch {
	case err == nil:
		writeAnswer(w, service, a, out)
	case errors.As(err, &fault):
		writeFault(w, fault)
	}
}

// errWait means that the Backend does not know yet.
var errWait = errors.New("not known yet")

// wait executes an action, again while the Backend does not know the outcome.
func (s *Server) wait(r *http.Request, q *request) (out []string, err error) {
	ticker := time.NewTicker(igdLook)
	defer ticker.Stop()
	late := time.NewTimer(igdWait)
	defer late.Stop()
	for {
		s.mu.Lock()
		now := time.Now()
		s.expire(now)
		out, err = q.action.do(s, q, now)
		s.mu.Unlock()
		if err != errWait {
			return out, err
		}
		select {
		case <-ticker.C:
			continue
		case <-r.Context().Done():
		case <-late.C:
			err = errFailed
		}
		s.mu.Lock()
		s.abandon(q)
		s.mu.Unlock()
		return nil, err
	}
}

// igdError is an error of UPnP (UPnP Device Architecture 1.0, section 3.2.2; WANIPConnection:1, section 2.4).
type igdError struct {
	code int
	text string
}

func (e igdError) Error() string { return fmt.Sprintf("UPnP error %d: %s", e.code, e.text) }

var (
	errInvalidAction = igdError{401, "Invalid Action"}
	errInvalidArgs   = igdError{402, "Invalid Args"}
	errFailed        = igdError{501, "Action Failed"}
	errNotAuthorized = igdError{606, "Action not authorized"}
	errIndex         = igdError{713, "SpecifiedArrayIndexInvalid"}
	errNoEntry       = igdError{714, "NoSuchEntryInArray"}
	errConflict      = igdError{718, "ConflictInMappingEntry"}
	errAnyRemote     = igdError{726, "RemoteHostOnlySupportsWildcard"}
	errFullTable     = igdError{728, "NoPortMapsAvailable"}
)

var igdErrors = map[State]error{
	Wait: errWait, Failed: errFailed, Unsupported: errFailed, Forbidden: errNotAuthorized, Full: errFullTable,
}
