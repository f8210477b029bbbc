package kernel

// Plan returns every command of nft(8), ip(8) and sysctl(8) that would be executed, in order, after comments that
// name the private networks that are reached directly. It changes nothing. The caller need not call Shut after New.
func (h *Host) Plan() ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, err := h.look()
	if err != nil {
		return nil, err
	}
	st := h.st
	st.see(l)
	st.ends, st.guard, st.arp, st.bridge, st.router = h.lastEnds, true, !h.noARP, !h.noBridge, isRouter()
	st.wasZero = readSysctl(srcValidMark) == "0"
	tables, err := h.c.tables(st)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range h.c.direct(l.lan) {
		out = append(out, "# directly, without the proxy: private network "+n)
	}
	for _, t := range tables {
		out = append(out, t.lines()...)
	}
	if readSysctl(srcValidMark) == "0" {
		out = append(out, "sysctl -w net.ipv4.conf.all.src_valid_mark=1")
	}
	for _, f := range h.families {
		for _, r := range h.wantRoutes(f, 1) {
			out = append(out, routeText(r, h.c.TUN))
		}
	}
	for _, f := range h.families {
		for _, r := range h.c.rules(f, l) {
			out = append(out, "ip "+r.String())
		}
	}
	return out, nil
}
