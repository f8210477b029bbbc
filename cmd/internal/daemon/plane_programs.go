package daemon

import (
	"net/netip"
	"sync"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/flow"
)

// programs finds the program of each flow, for those who list flows. It looks up nothing before it is asked, and
// remembers what it finds: a flow keeps its program as long as it lives.
type programs struct {
	mu    sync.Mutex
	from  flow.Owners
	known map[uint64]program // by the ID of the flow
}

type program struct {
	pid int
	exe string
	at  time.Time // when it was looked up
}

const (
	// maxPrograms limits what is remembered. What exceeds it is forgotten and looked up again.
	maxPrograms = control.MaxFlows
	// maxLookups is how many flows are looked up in one call: some milliseconds of sock_diag, and one pass over
	// /proc.
	maxLookups = 1000
	// lookAgain is when an unknown program of a flow is looked up again. Its socket may belong to a guest, or its
	// process to another user.
	lookAgain = 5 * time.Second
)

// newPrograms uses from to look up sockets; nil: no lookups.
func newPrograms(from flow.Owners) *programs {
	return &programs{from: from, known: map[uint64]program{}}
}

// name fills in PID and Exe of flows without them.
func (p *programs) name(flows []control.Flow) {
	if p.from == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	var ask []flow.Flow
	var at []int
	for i := range flows {
		f := &flows[i]
		if f.PID != 0 {
			continue
		}
		if k, ok := p.known[f.ID]; ok && (k.pid != 0 || now.Sub(k.at) < lookAgain) {
			f.PID, f.Exe = k.pid, k.exe
			continue
		}
		if q, ok := question(f); ok && len(ask) < maxLookups {
			ask, at = append(ask, q), append(at, i)
		}
	}
	if len(ask) == 0 {
		return
	}
	owners := make([]flow.Owner, len(ask))
	p.from.OwnersOf(ask, owners)
	for i, o := range owners {
		f := &flows[at[i]]
		f.PID, f.Exe = o.PID, o.Exe
		if len(p.known) >= maxPrograms {
			clear(p.known)
		}
		p.known[f.ID] = program{o.PID, o.Exe, now}
	}
}

// question returns the flow with which to ask for its owner.
func question(f *control.Flow) (q flow.Flow, ok bool) {
	q.Proto = flow.TCP
	if f.Proto == flow.UDP.String() {
		q.Proto = flow.UDP
	}
	src, err := netip.ParseAddrPort(f.Src)
	dst, err2 := netip.ParseAddrPort(f.Dst)
	q.Src, q.Dst = src, dst
	return q, err == nil && err2 == nil
}
