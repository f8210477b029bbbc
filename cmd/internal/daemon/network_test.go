package daemon

import (
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/tun/netns"
)

func TestLeadsElsewhere(t *testing.T) {
	for _, c := range []struct {
		change netns.Change
		want   bool
	}{
		{netns.Change{Link: 3}, false},
		{netns.Change{DefaultRoute: true}, true},
		{netns.Change{Lost: true}, true},
		{netns.Change{Addr: netip.MustParsePrefix("192.0.2.7/24"), AddrLink: 3}, true},
		{netns.Change{Addr: netip.MustParsePrefix("2001:db8::7/64"), AddrLink: 3}, true},
		{netns.Change{Addr: netip.MustParsePrefix("fe80::7/64"), AddrLink: 3}, false},
		{netns.Change{Addr: netip.MustParsePrefix("169.254.1.7/16"), AddrLink: 3}, false},
		{netns.Change{Addr: netip.MustParsePrefix("127.0.0.2/8"), AddrLink: 1}, false},
	} {
		if got := leadsElsewhere(c.change); got != c.want {
			t.Errorf("%+v: %v", c.change, got)
		}
	}
}

// TestSettling: changes are told of when they have ended, and those that never end after a while.
func TestSettling(t *testing.T) {
	s := newSettling()
	s.changed()
	s.changed() // does not wait for anybody
	<-s.news
	if s.noted(); s.due == nil {
		t.Fatal("nothing is due")
	}
	if d := time.Until(s.latest); d <= settleAfter || d > settleMost {
		t.Errorf("due in %v at the latest", d)
	}
	first := s.due
	if s.noted(); s.due == first {
		t.Error("a second change puts nothing off")
	}
	s.latest = time.Now() // they have gone on for so long
	s.noted()
	select {
	case <-s.due:
	case <-time.After(settleAfter / 2):
		t.Error("it is put off for ever")
	}
}
