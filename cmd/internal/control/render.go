package control

import (
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// WriteStatus writes s as text. now is the reader's time.
func WriteStatus(w io.Writer, s Status, now time.Time) error {
	var b strings.Builder
	statusHead(&b, &s, now)
	statusRoutes(&b, &s)
	statusTraffic(&b, &s)
	if s.Mode != ModeRun {
		statusHost(&b, &s)
	}
	counters(&b, "what could not be carried", s.Dropped)
	_, err := io.WriteString(w, b.String())
	return err
}

// statusHead writes what is running, since when, and its warnings.
func statusHead(b *strings.Builder, s *Status, now time.Time) {
	fmt.Fprintf(
		b,
		"viasocks %s: %s, up since %s (%s), process %d\n",
		Plain(s.Version),
		Plain(s.State),
		stamp(s.Since),
		span(now.Sub(s.Since)),
		s.PID,
	)
	if s.Mode == ModeRun {
		fmt.Fprintf(b, "  program %s, process %d\n", Plain(s.Program), s.Inside)
	}
	if s.Mode == ModeAttach {
		fmt.Fprintf(b, "  attached to %s\n", Plain(s.Program))
	}
	if s.Name != "" {
		fmt.Fprintf(b, "  name %s\n", Plain(s.Name))
	}
	if p := s.Published; p != nil {
		fmt.Fprintf(b, "  published %s: %d connections, %d refused; %d datagrams, %d dropped; %d open now\n",
			Plain(strings.Join(p.Ports, ", ")), p.Connections, p.Refused, p.Datagrams, p.Dropped, p.Open)
	}
	renderListening(b, s.Listening)
	if s.Before > 0 {
		fmt.Fprintf(b, "  %d flows are still carried by the viasocks from which this one has taken over\n", s.Before)
	}
	if s.State == Waiting {
		fmt.Fprintf(b, "  waiting for the proxy; the host is closed until it can be reached: %s\n", Plain(s.Waiting))
	}
	if s.ConfirmBy != nil && s.State != Stopping {
		fmt.Fprintf(b, "  all changes are undone in %s: 'viasocks confirm' keeps them\n", span(s.ConfirmBy.Sub(now)))
	}
	if s.Config != "" {
		fmt.Fprintf(b, "  configuration %s", Plain(s.Config))
		if s.Reloaded != nil {
			fmt.Fprintf(b, ", reloaded %s ago", span(now.Sub(*s.Reloaded)))
		}
		b.WriteString("\n")
	}
	for _, t := range s.Warnings {
		fmt.Fprintf(b, "  warning: %s\n", Plain(t))
	}
}

// statusRoutes writes the proxies and the rules.
func statusRoutes(b *strings.Builder, s *Status) {
	b.WriteString("\nproxies\n")
	table(b, func(w io.Writer) {
		for _, u := range s.Upstreams {
			where := u.URL
			if u.Via != "" {
				where += " via " + u.Via
			}
			fmt.Fprintf(w, "  %s\t%s\tTCP %s\tUDP %s%s\n", Plain(u.Name), Plain(where), Plain(u.TCP), Plain(u.UDP), learned(&u))
			for _, x := range u.Servers {
				fmt.Fprintf(w, "  \t  %s\t%s\t%s\n", Plain(x.URL), Plain(x.State), Plain(x.Why))
			}
		}
	})
	b.WriteString("\nrules, and how often they decided\n")
	table(b, func(w io.Writer) {
		for _, r := range s.Rules {
			hits := count(r.Hits)
			if r.Kernel {
				hits = "kernel"
			}
			fmt.Fprintf(w, "  %s\t%s\n", hits, Plain(r.Rule))
		}
	})
}

// statusTraffic writes the counters of connections, datagrams, names and bytes.
func statusTraffic(b *strings.Builder, s *Status) {
	b.WriteString("\ntraffic\n")
	fmt.Fprintf(
		b,
		"  TCP    %d now, %d of them waiting for the proxy; %s in total, %s refused\n",
		s.TCP.Now,
		s.TCP.Pending,
		count(s.TCP.Total),
		count(s.TCP.Refused),
	)
	if s.TCP.SecondTries > 0 {
		fmt.Fprintf(b, "         %s names that a proxy could not reach were tried by address, %s of them with success\n",
			count(s.TCP.SecondTries), count(s.TCP.SecondOpened))
	}
	fmt.Fprintf(
		b,
		"  UDP    %d mappings now; %s in total, %s associations made again, %s datagrams refused\n",
		s.UDP.Now,
		count(s.UDP.Total),
		count(s.UDP.Reassociated),
		count(s.UDP.Refused),
	)
	if s.UDP.GSO != "" {
		fmt.Fprintf(b, "         segmentation toward the proxy (GSO) is %s: %s\n", Plain(s.UDP.GSO), Plain(s.UDP.GSOReason))
	}
	statusNames(b, &s.Names, s.DNS)
	if n := s.Sniff; n != nil {
		fmt.Fprintf(b, "  sniff  %s connections were held for their first bytes, %s of them had a name; %s were put off\n",
			count(n.Asked), count(n.Named), count(n.Full))
	}
	fmt.Fprintf(b, "  bytes  %s up, %s down\n", byteCount(s.Up), byteCount(s.Down))
	if s.Shards.Now > 1 {
		fmt.Fprintf(b,
			"  shards %d; %s packets arrived in the queue of another shard\n", s.Shards.Now, count(s.Shards.HandedOver))
	}
}

// statusNames writes the counters of names, and what answers them.
func statusNames(b *strings.Builder, n *Names, dns []string) {
	fmt.Fprintf(
		b,
		"  names  %s asked, %s answered (%s of them by viasocks itself), %s failed; mode and resolvers: %s\n",
		count(n.Asked),
		count(n.Answered),
		count(n.Own),
		count(n.Failed),
		Plain(strings.Join(dns, ", ")),
	)
	if n.Cache.Entries > 0 || n.Cached > 0 || n.Shared > 0 {
		fmt.Fprintf(b, "         cache: %s answers in %s; %s questions answered from it, %s that others asked at the same time\n",
			count(uint64(n.Cache.Entries)), byteCount(uint64(n.Cache.Bytes)), count(n.Cached), count(n.Shared))
	}
	if p := n.Pool; p != nil {
		fmt.Fprintf(
			b,
			"         %s of %s fake addresses given out, %s in use; %s reused for other names, %s names got none\n",
			count(p.Names),
			count(p.Size),
			count(p.Held),
			count(p.Evicted),
			count(p.Refused),
		)
	}
}

// statusHost writes what 'up' has changed on the host, and the packets that its filter refused.
func statusHost(b *strings.Builder, s *Status) {
	place := "host"
	if s.Mode == ModeAttach {
		place = "namespace"
	}
	fmt.Fprintf(b, "\n%s: device %s, table %d, mark %s\n", place, Plain(s.Host.TUN), s.Host.Table, Plain(s.Host.Mark))
	if s.Host.Resolved {
		b.WriteString("  systemd-resolved asks viasocks for names\n")
	}
	list(b, "through the proxy", s.Host.Steered)
	list(b, "answered directly", s.Host.Kept)
	list(b, "directly, without the proxy", s.Host.Excluded)
	counters(b, "packets that the filter refused", s.Host.Refused)
}

// WriteFlows writes f as text.
func WriteFlows(w io.Writer, f Flows, now time.Time) error {
	var b strings.Builder
	if len(f.Flows) == 0 {
		b.WriteString("there are no flows\n")
	}
	table(&b, func(w io.Writer) {
		for i, x := range f.Flows {
			if i == 0 {
				fmt.Fprintln(w, "ID\tPROGRAM\tPROTO\tFROM\tTO\tVIA\tSTATE\tAGE\tUP\tDOWN")
			}
			fmt.Fprintf(
				w,
				"%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
				x.ID,
				Plain(programOf(x)),
				Plain(x.Proto),
				Plain(x.Src),
				Plain(destination(x)),
				Plain(x.Upstream),
				Plain(x.State),
				span(now.Sub(x.Start)),
				byteCount(x.Up),
				byteCount(x.Down),
			)
		}
	})
	if more := f.Total - len(f.Flows); more > 0 {
		fmt.Fprintf(&b, "and %d more: see --limit\n", more)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// programOf returns the program of a flow in the form 4711/aria2c.
func programOf(f Flow) string {
	switch {
	case f.PID == 0:
		return "-"
	case f.Exe == "":
		return strconv.Itoa(f.PID)
	}
	return strconv.Itoa(f.PID) + "/" + filepath.Base(f.Exe)
}

// WriteInstances writes a list of instances as text.
func WriteInstances(w io.Writer, all []Instance, now time.Time) error {
	var b strings.Builder
	if len(all) == 0 {
		b.WriteString("there is no viasocks that you may ask\n")
	}
	table(&b, func(w io.Writer) {
		for i, x := range all {
			if i == 0 {
				fmt.Fprintln(w, "PID\tUSER\tPROGRAM\tPROXY\tSTATE\tFLOWS\tUP\tDOWN\tAGE")
			}
			if x.State == NoAnswer {
				fmt.Fprintf(w, "%d\t%s\t-\t-\t%s\t-\t-\t-\t-\n", x.PID, Plain(x.User), x.State)
				continue
			}
			program := x.Program
			switch {
			case x.Mode == ModeUp:
				program = "(the host)"
			case x.Mode == ModeAttach && x.Name == "":
				program = "(" + program + ")"
			case x.Name != "":
				program = x.Name + " (" + program + ")"
			}
			fmt.Fprintf(
				w,
				"%d\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n",
				x.PID,
				Plain(x.User),
				Plain(program),
				Plain(x.Proxy),
				Plain(x.State),
				x.Flows,
				byteCount(x.Up),
				byteCount(x.Down),
				span(now.Sub(x.Since)),
			)
		}
	})
	_, err := io.WriteString(w, b.String())
	return err
}

// learned is what flows have shown of a proxy, as further cells.
func learned(u *Upstream) (cells string) {
	if u.Granted > 0 || u.Failed > 0 {
		cells += fmt.Sprintf("\t%s granted, %s failed", count(u.Granted), count(u.Failed))
	}
	if u.LatencyMS > 0 {
		cells += "\tlatency " + milliseconds(u.LatencyMS)
	}
	if u.IPv6 != "" {
		cells += "\tIPv6: " + Plain(u.IPv6)
	}
	if u.NamesUDP != "" {
		cells += "\tnames in UDP: " + Plain(u.NamesUDP)
	}
	return cells
}

func table(b *strings.Builder, rows func(io.Writer)) {
	t := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	rows(t)
	t.Flush() // a Builder accepts everything
}

func list(b *strings.Builder, title string, lines []string) {
	if len(lines) == 0 {
		return
	}
	fmt.Fprintf(b, "  %s:\n", title)
	for _, l := range lines {
		fmt.Fprintf(b, "    %s\n", Plain(l))
	}
}

func counters(b *strings.Builder, title string, cs []Counter) {
	if len(cs) == 0 {
		return
	}
	fmt.Fprintf(b, "\n%s\n", title)
	table(b, func(w io.Writer) {
		for _, c := range cs {
			fmt.Fprintf(w, "  %s\t%s\n", count(c.Packets), Plain(c.What))
		}
	})
}

// stamp formats a time in the local zone.
func stamp(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

// span formats a duration in at most two units: 41s, 5m3s, 2h7m, 12d4h.
func span(d time.Duration) string {
	d = max(d, 0).Round(time.Second)
	day := 24 * time.Hour
	switch {
	case d >= day:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Minute:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	}
	return fmt.Sprintf("%ds", d/time.Second)
}

// milliseconds formats a time that may be a fraction of a millisecond.
func milliseconds(ms float64) string {
	if ms < 9.95 {
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.0f ms", ms)
}

// count formats a number with separated thousands.
func count(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// byteCount formats a number of bytes in the unit that leaves one to four digits.
func byteCount(n uint64) string {
	if n < 10_000 {
		return count(n) + " B"
	}
	f := float64(n)
	for _, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if f /= 1024; f < 1000 || unit == "TiB" {
			return fmt.Sprintf("%.1f %s", f, unit)
		}
	}
	return ""
}

func renderListening(b *strings.Builder, l *Listening) {
	if l == nil {
		return
	}
	for _, p := range l.Ports {
		outer := "nowhere now"
		if p.Outer != "" {
			outer = Plain(p.Outer)
		}
		if p.Outer6 != "" {
			outer += " and " + Plain(p.Outer6)
		}
		if p.Proto == "udp" {
			fmt.Fprintf(b, "  peers reach port %d/udp at %s by %s", p.Port, outer, Plain(p.Upstream))
		} else {
			fmt.Fprintf(b, "  peers reach port %d at %s by %s: %d open now", p.Port, outer, Plain(p.Upstream), p.Open)
		}
		if p.Filtered {
			b.WriteString("; filtered: only those to whom the program has sent")
		}
		if p.Why != "" {
			fmt.Fprintf(b, "; %s", Plain(p.Why))
		}
		if p.Why6 != "" {
			fmt.Fprintf(b, "; by IPv6: %s", Plain(p.Why6))
		}
		b.WriteString("\n")
	}
	for _, f := range l.Forwarded {
		fmt.Fprintf(b, "  forwarded by the provider: port %d/%s", f.Port, Plain(f.Proto))
		if f.Addr != "" {
			fmt.Fprintf(b, " of %s", Plain(f.Addr))
		}
		if f.Inner != 0 {
			fmt.Fprintf(b, ", told to port %d of the program\n", f.Inner)
		} else {
			b.WriteString(", no program has asked\n")
		}
	}
	fmt.Fprintf(b, "  peers %d accepted, %d refused by the program, %d with an impossible address\n", l.Accepted, l.Refused,
		l.Bogus)
}
