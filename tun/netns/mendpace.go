package netns

import "time"

// The TUN is repaired at once when others change it, and a process of ours is started again at once when others end it. If
// they repeat this within mendCalm, each repair is delayed longer.
const (
	mendAgain = 250 * time.Millisecond
	mendMost  = 30 * time.Second
	mendCalm  = time.Minute
)

// MendPace tells when something may be repaired again (Wanted.Mend, tender). The zero value is ready to use. It belongs to one
// goroutine.
type MendPace struct {
	mends int       // repairs within mendCalm of each other
	last  time.Time // time of the last repair
	next  time.Time // earliest time of the next one
}

// Delay returns how long to wait before the next repair. It is 0 if there was none for a while.
func (p *MendPace) Delay(now time.Time) time.Duration {
	if now.Sub(p.last) > mendCalm {
		p.mends, p.next = 0, time.Time{}
	}
	return max(p.next.Sub(now), 0)
}

// Mended records that there was a repair, or that one was tried.
func (p *MendPace) Mended(now time.Time) {
	p.last = now
	p.next = now.Add(min(mendAgain<<min(p.mends, 10), mendMost))
	p.mends++
}
