package hosttest

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/testkit"
)

// straightWay is what becomes of probes when a rule lets chosenNets out: TCP and UDP of this host goes, and nothing else.
func straightWay(p *probe) way {
	switch {
	case p.class == strict:
		return usual(p)
	case strings.Contains(p.name, "with our mark"),
		strings.Contains(p.name, "re-marked"),
		p.name == "raw, own header",
		p.ns == "ctr":
		return whatever // the mark of viasocks' own sockets; other programs' rules; by its own sockets, for containers
	case !to(chosenNets)(p), p.to.Port() == 53:
		return usual(p)
	case strings.HasPrefix(p.name, "tcp"), strings.HasPrefix(p.name, "udp"), strings.HasPrefix(p.name, "fragments"),
		p.name == "ntp", p.name == "dns over tls":
		return loose
	}
	return held
}

// TestDirectInKernel: what rules let out by network and port goes past the TUN, with nothing to count, also when viasocks
// was killed; nothing else leaves.
func TestDirectInKernel(t *testing.T) {
	if !apart(t) {
		return
	}
	o, _ := newChoosing(t)
	w := o.w
	o.rec.known(w.proxy(proxy4 + ":1080"))
	before := w.state()
	d := w.up("--proxy", proxyURL, "--rule", "dst "+chosenNets+" direct")
	o.mixed("up", straightWay)
	o.carries("up", somewhere, 0)
	total := ask[control.Status](w, "status").TCP.Total
	w.direct("up", chosen)
	s := ask[control.Status](w, "status")
	if len(s.Rules) < 2 || !s.Rules[0].Kernel || s.Rules[1].Kernel {
		t.Errorf("the status does not say that the kernel has the first rule: %+v", s.Rules)
	}
	if s.TCP.Total != total {
		t.Errorf("%d connections came to viasocks", s.TCP.Total-total)
	}
	d.kill()
	o.mixed("killed", func(p *probe) way {
		if p.ns == "ctr" {
			return usual(p)
		}
		return straightWay(p)
	})
	w.direct("killed", chosen)
	if out, err := w.command("down"); err != nil {
		t.Fatalf("down: %v\n%s", err, out)
	}
	w.same("after down", before, w.state())
	// With everything asked of viasocks the same goes by its sockets.
	w.up("--proxy", proxyURL, "--rule", "dst "+chosenNets+" direct", "--direct", "carry")
	w.direct("carry", chosen)
	s = ask[control.Status](w, "status")
	if s.Rules[0].Kernel || s.Rules[0].Hits < 2 {
		t.Errorf("--direct carry: %+v", s.Rules)
	}
}

// TestDirectInKernelHasOrder: an earlier rule that decides otherwise about part of a network keeps that part.
func TestDirectInKernelHasOrder(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	who(w)
	w.proxy(proxy4 + ":1080")
	w.configure("proxy socks5://" + proxy4)
	for _, c := range []struct {
		rules  string
		kernel []bool
		first  string // from where chosen4 is reached
		second string // and somewhere4
	}{
		{"dst " + chosen4 + " via proxy; dst 203.0.113.0/24 direct", []bool{false, false}, proxy4, host4},
		{"dst " + chosen4 + " direct; dst 203.0.113.0/24 via proxy", []bool{true, false}, host4, proxy4},
		{"dst " + chosen4 + " via proxy; dst " + somewhere4 + " direct", []bool{false, true}, proxy4, host4},
		{fmt.Sprintf("port %d via proxy; dst 203.0.113.0/24 direct", whoPort), []bool{false, false}, proxy4, proxy4},
		{fmt.Sprintf("dst %s reject; port %d direct", "203.0.113.9", whoPort), []bool{false, false}, host4, host4},
		{fmt.Sprintf("port %d direct", whoPort), []bool{true}, host4, host4},
	} {
		flags := []string{"--proxy", proxyURL}
		for r := range strings.SplitSeq(c.rules, "; ") {
			flags = append(flags, "--rule", r)
		}
		d := w.up(flags...)
		for _, x := range [][2]string{{chosen4, c.first}, {somewhere4, c.second}} {
			if got, err := w.askWho(x[0], 0); err != nil || got != x[1] {
				t.Errorf("%s: %s is reached from %q (%v), want %s", c.rules, x[0], got, err, x[1])
			}
		}
		var kernel []bool
		for _, r := range ask[control.Status](w, "status").Rules[:len(c.kernel)] {
			kernel = append(kernel, r.Kernel)
		}
		if !slices.Equal(kernel, c.kernel) {
			t.Errorf("%s: in the kernel: %v, want %v", c.rules, kernel, c.kernel)
		}
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	}
}

// TestDirectInKernelReloads: a reload adds and removes such rules, and whenever viasocks is killed meanwhile, nothing
// leaves that neither the old nor the new rules let out.
func TestDirectInKernelReloads(t *testing.T) {
	if !apart(t) {
		return
	}
	o, _ := newChoosing(t)
	w := o.w
	o.rec.known(w.proxy(proxy4 + ":1080"))
	before := w.state()
	file := func(direct bool) {
		verdict := "via proxy"
		if direct {
			verdict = "direct"
		}
		w.configure("proxy " + proxyURL + "\nrule dst " + chosenNets + " " + verdict)
	}
	either := func(p *probe) way {
		if to(chosenNets)(p) {
			return whatever
		}
		return usual(p)
	}
	for i := range 20 {
		file(i%2 == 0)
		d := w.up("--config", configFile)
		if i < 2 {
			o.mixedDuring("reload", either, func() { file(i%2 != 0); d.reload() })
			way := usual
			if i == 1 {
				way = straightWay
			}
			o.g.forget()
			o.mixed("reloaded", way)
		}
		o.mixedDuring(fmt.Sprintf("killed %d", i), either, func() {
			file(i%2 != 0)
			d.signal(syscall.SIGHUP)
			testkit.Pace(time.Duration(i) * time.Millisecond) // to the instant
			d.kill()
		})
		o.g.forget()
		if out, err := w.command("down"); err != nil {
			t.Fatalf("down: %v\n%s", err, out)
		}
	}
	w.same("after all", before, w.state())
}
