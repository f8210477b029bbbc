package stack

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// maxShards is the number of queues for frames that a TUN is opened with, because each shard needs one.
const maxShards = 16

// shard is a part of the flows, with everything that handles their frames: queues of the device and their reader, an
// engine, a table of pending SYNs, counters. A flow belongs to the shard of the app's port. The flows of different
// shards share no lock except for the counts of the budget, once for each SYN.
type shard struct {
	*Stack // what all shards have in common

	index int
	dev   tun.Part
	stats counters
	inbox inbox

	engine  atomic.Pointer[engine]
	feeding sync.Mutex // held while gVisor takes a frame, and while the engine is replaced
	pending *pendingTable
	acks    *ackHold
}

func newShard(s *Stack, dev tun.Part, b *budget, cfg Config) (*shard, error) {
	p := &shard{Stack: s, index: len(s.shards), dev: dev}
	p.acks = newACKHold(dev, &p.stats)
	p.pending = newPendingTable(cfg.Limits, b, cfg.Sockets, &p.stats)
	p.pending.open, p.pending.abort, p.pending.shake, p.pending.answer = p.open, p.abortHandshake, p.handshake, p.answer
	e, err := p.newEngine()
	if err != nil {
		return nil, err
	}
	p.engine.Store(e)
	return p, nil
}

// home returns the shard of an app's port. Neighbouring ports are common; the golden ratio spreads them (Knuth, TAOCP
// 6.4). The upper bits are used, because tun uses the middle ones to choose among a part's queues.
func (s *Stack) home(port uint16) int {
	return int(uint64(uint32(port)*0x9E3779B1) * uint64(len(s.shards)) >> 32)
}

// Home returns the number of the shard to which the flows of an app's port belong. Any goroutine may call it.
func (s *Stack) Home(port uint16) int { return s.home(port) }

// homeOf returns the shard that a packet belongs to. A packet without a port stays where it is, except for fragments:
// those of one datagram meet in one shard, whose engine reassembles them (see rehome).
func (s *shard) homeOf(b []byte, p *packet) *shard {
	if len(s.shards) == 1 {
		return s
	}
	port, ok := appPort(b, p)
	switch {
	case ok:
	case p.frag:
		port = p.id
	default:
		return s
	}
	return s.shards[s.home(port)]
}

// rehome hands a reassembled packet to the shard of the app's port if that is another one.
func (s *shard) rehome(proto byte, pkt *gstack.PacketBuffer) bool {
	l4 := pkt.TransportHeader().Slice()
	if len(s.shards) == 1 || len(l4) < 4 || proto != protoTCP && proto != protoUDP {
		return false
	}
	to := s.shards[s.home(binary.BigEndian.Uint16(l4))]
	if to == s {
		return false
	}
	ip, data := pkt.NetworkHeader().Slice(), pkt.Data().AsRange().ToSlice()
	n := len(l4) + len(data)
	var head [ip6HeaderLen]byte
	hdr := head[:copy(head[:], ip)]
	if len(hdr) == ip6HeaderLen && hdr[0]>>4 == 6 {
		binary.BigEndian.PutUint16(hdr[4:], uint16(n))
		hdr[6] = proto
	} else {
		hdr = hdr[:ip4HeaderLen] // without options
		n += ip4HeaderLen
		hdr[0], hdr[6], hdr[7], hdr[10], hdr[11] = 0x45, 0, 0, 0, 0
		binary.BigEndian.PutUint16(hdr[2:], uint16(n))
		binary.BigEndian.PutUint16(hdr[10:], ^checksum.Checksum(hdr, 0))
	}
	if n > 65535 {
		s.stats.DroppedHandover.Add(1)
		return true
	}
	if proto == protoUDP {
		s.stats.udp.InReassembled.Add(1)
	}
	s.hand(to, &tun.Header{}, hdr, l4, data)
	return true
}
