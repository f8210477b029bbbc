package dns

import (
	"encoding/binary"
	"net/netip"
)

// OwnName is a name that belongs to the Server itself. Its addresses never change.
type OwnName struct {
	Name   string     // in lower case, without the dot at the end; empty: there is none
	V4, V6 netip.Addr // an invalid one means that there is no address of this family
}

// answerOwn replies if the question is for Config.Own, and reports whether it was.
func (s *Server) answerOwn(msg []byte, q *question, reply func([]byte)) bool {
	if !q.isQuery() { // other operations may have no question
		return false
	}
	if class := binary.BigEndian.Uint16(msg[q.end-2:]); class != classIN && class != classANY {
		return false
	}
	buf := answerBuffers.Get().(*[maxFakeAnswer]byte)
	defer answerBuffers.Put(buf)
	if name, _, plain := appendAny(buf[:0], msg, headerLen); !plain || string(name) != s.cfg.Own.Name {
		return false
	}
	set := addressSet{ttl: loopbackTTL}
	if q.qtype == typeA || q.qtype == typeANY {
		set.v4 = s.cfg.Own.V4
	}
	if q.qtype == typeAAAA || q.qtype == typeANY {
		set.v6 = s.cfg.Own.V6
	}
	if !set.v4.IsValid() && !set.v6.IsValid() {
		set = negative
	}
	b := appendReply(buf[:0], msg, q, 0, set)
	s.count.Own.Add(1)
	s.tell(q, howOwn, "", b)
	reply(b)
	return true
}
