package portmap

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

const (
	// maxLease is the longest lease of UPnP in seconds, as in WANIPConnection:2. 0 asks for a port without an end.
	maxLease = 604800
	forever  = 100 * 365 * 24 * time.Hour
	// maxText limits the description of a port.
	maxText = 128
)

// action is an action of a service. do is called with the lock held. It returns the values of out, errWait, or an igdError.
type action struct {
	name    string
	in, out []string
	do      func(s *Server, q *request, now time.Time) (out []string, err error)
}

// request is a call of an action by a program.
type request struct {
	action *action
	args   map[string]string
	client netip.Addr
	made   *key // the mapping that this request made
}

func find(all []action, name string) *action {
	i := slices.IndexFunc(all, func(a action) bool { return a.name == name })
	if i < 0 {
		return nil
	}
	return &all[i]
}

var (
	argsPort  = []string{"NewRemoteHost", "NewExternalPort", "NewProtocol"}
	argsInner = []string{"NewInternalPort", "NewInternalClient", "NewEnabled", "NewPortMappingDescription", "NewLeaseDuration"}

	// actionsIP are those of WANIPConnection:1, and AddAnyPortMapping of WANIPConnection:2, by which a program accepts
	// another port than the one it prefers.
	actionsIP = []action{
		{"GetExternalIPAddress", nil, []string{"NewExternalIPAddress"}, (*Server).getAddress},
		{"GetStatusInfo", nil, []string{"NewConnectionStatus", "NewLastConnectionError", "NewUptime"}, (*Server).getStatus},
		{"GetConnectionTypeInfo", nil, []string{"NewConnectionType", "NewPossibleConnectionTypes"},
			func(*Server, *request, time.Time) ([]string, error) { return []string{"IP_Routed", "IP_Routed"}, nil }},
		{"AddPortMapping", slices.Concat(argsPort, argsInner), nil, (*Server).addPort},
		{"AddAnyPortMapping", slices.Concat(argsPort, argsInner), []string{"NewReservedPort"}, (*Server).addAny},
		{"DeletePortMapping", argsPort, nil, (*Server).deletePort},
		{"GetSpecificPortMappingEntry", argsPort, argsInner, (*Server).getSpecific},
		{"GetGenericPortMappingEntry", []string{"NewPortMappingIndex"}, slices.Concat(argsPort, argsInner), (*Server).getGeneric},
	}
	// actionsCIF is the least that programs want of WANCommonInterfaceConfig:1.
	actionsCIF = []action{{"GetCommonLinkProperties", nil, []string{"NewWANAccessType", "NewLayer1UpstreamMaxBitRate",
		"NewLayer1DownstreamMaxBitRate", "NewPhysicalLinkStatus"}, (*Server).getLink}}
)

func (s *Server) getAddress(*request, time.Time) ([]string, error) {
	at, state := s.back.External()
	if state != Works {
		return nil, igdErrors[state]
	}
	return []string{at.String()}, nil
}

func (s *Server) getStatus(_ *request, now time.Time) ([]string, error) {
	_, state := s.back.External()
	if state == Wait {
		return nil, errWait
	}
	status := "Connected"
	if state != Works {
		status = "Disconnected"
	}
	return []string{status, "ERROR_NONE", strconv.Itoa(int(s.epoch(now)))}, nil
}

func (s *Server) getLink(*request, time.Time) ([]string, error) {
	_, state := s.back.External()
	link := "Up"
	switch state {
	case Wait:
		return nil, errWait
	case Works:
	default:
		link = "Down"
	}
	return []string{"Ethernet", "0", "0", link}, nil
}

// port returns the protocol and the outer port of a request.
func (q *request) port() (p Proto, outer uint16, err error) {
	switch q.args["NewProtocol"] {
	case "TCP":
		p = TCP
	case "UDP":
		p = UDP
	default:
		return 0, 0, errInvalidArgs
	}
	n, err := strconv.ParseUint(q.args["NewExternalPort"], 10, 16)
	if err != nil {
		return 0, 0, errInvalidArgs
	}
	return p, uint16(n), nil
}

func (s *Server) addPort(q *request, now time.Time) ([]string, error) {
	_, err := s.addIGD(q, false, now)
	return nil, err
}

func (s *Server) addAny(q *request, now time.Time) ([]string, error) {
	outer, err := s.addIGD(q, true, now)
	return []string{strconv.Itoa(int(outer))}, err
}

// addIGD makes a port. any: the program accepts another outer port than the one it asks for.
func (s *Server) addIGD(q *request, any bool, now time.Time) (outer uint16, err error) {
	proto, want, err := q.port()
	inner, innerErr := strconv.ParseUint(q.args["NewInternalPort"], 10, 16)
	lease, leaseErr := strconv.ParseUint(q.args["NewLeaseDuration"], 10, 32)
	text := q.args["NewPortMappingDescription"]
	client, clientErr := netip.ParseAddr(q.args["NewInternalClient"])
	enabled := q.args["NewEnabled"]
	switch {
	case err != nil:
		return 0, err
	case innerErr != nil, leaseErr != nil, clientErr != nil, inner == 0, want == 0 && !any,
		len(text) > maxText, !utf8.ValidString(text), enabled != "1" && enabled != "true" && enabled != "yes":
		return 0, errInvalidArgs
	case q.args["NewRemoteHost"] != "":
		return 0, errAnyRemote
	case client != q.client: // nobody may map a port of another
		return 0, errNotAuthorized
	}
	k := key{proto, client, uint16(inner), true}
	fresh, until := s.ports[k] == nil, time.Time{}
	if !fresh {
		until = s.ports[k].until
	}
	m, state := s.request(k, want, lifetime(maxLease), now)
	switch {
	case m == nil:
	case fresh:
		q.made = &k
	default:
		m.until = until // unless the request succeeds, see below
	}
	switch {
	case state == Wait:
		return 0, errWait
	case state != Works:
		s.answered(state)
		return 0, igdErrors[state]
	case !any && m.outer.Port() != want:
		s.count.Refused++
		s.abandon(q)
		return 0, errConflict
	}
	s.answered(state)
	m.text, m.until = text, now.Add(forever)
	if lease > 0 {
		m.until = now.Add(time.Duration(min(lease, maxLease)) * time.Second)
	}
	return m.outer.Port(), nil
}

// abandon ends the mapping that a request made and whose outcome its program does not accept, or does not learn.
func (s *Server) abandon(q *request) {
	if q.made != nil && s.ports[*q.made] != nil {
		s.drop(*q.made)
	}
}

// entry is a port that a program has by UPnP, and where it is reached now.
type entry struct {
	key
	*mapping
	outer netip.AddrPort
}

// entries returns the ports that can be reached now, in order.
func (s *Server) entries() (all []entry) {
	for k, m := range s.ports {
		if !k.igd {
			continue
		}
		if at, state := s.back.Map(k.want(0)); state == Works {
			all = append(all, entry{k, m, at})
		}
	}
	slices.SortFunc(all, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.proto, b.proto), a.client.Compare(b.client), cmp.Compare(a.port, b.port))
	})
	return all
}

// inner returns the values of argsInner.
func (e entry) inner(now time.Time) []string {
	lease := "0"
	if left := e.until.Sub(now); left <= maxLease*time.Second {
		lease = strconv.Itoa(int(max(left/time.Second, 1)))
	}
	return []string{strconv.Itoa(int(e.port)), e.client.String(), "1", e.text, lease}
}

func (s *Server) getSpecific(q *request, now time.Time) ([]string, error) {
	proto, outer, err := q.port()
	if err != nil {
		return nil, err
	}
	for _, e := range s.entries() {
		if e.proto == proto && e.outer.Port() == outer {
			return e.inner(now), nil
		}
	}
	return nil, errNoEntry
}

func (s *Server) getGeneric(q *request, now time.Time) ([]string, error) {
	i, err := strconv.ParseUint(q.args["NewPortMappingIndex"], 10, 16)
	if err != nil {
		return nil, errInvalidArgs
	}
	all := s.entries()
	if int(i) >= len(all) {
		return nil, errIndex
	}
	e, proto := all[i], "TCP"
	if e.proto == UDP {
		proto = "UDP"
	}
	return append([]string{"", strconv.Itoa(int(e.outer.Port())), proto}, e.inner(now)...), nil
}

// deletePort ends a port of the program, by the outer port that it was given or has now.
func (s *Server) deletePort(q *request, _ time.Time) ([]string, error) {
	proto, outer, err := q.port()
	if err != nil {
		return nil, err
	}
	for k, m := range s.ports {
		if !k.igd || k.proto != proto || k.client != q.client {
			continue
		}
		at, _ := s.back.Map(k.want(0))
		if m.outer.Port() == outer || at.Port() == outer {
			s.drop(k)
			return nil, nil
		}
	}
	return nil, errNoEntry
}
