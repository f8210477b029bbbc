package process

import "testing"

// TestDropCode: the pages of the program file go, and the program goes on.
func TestDropCode(t *testing.T) {
	resident := func() (n, regions int) {
		for _, r := range codeRegions() {
			if r.to <= r.from {
				t.Errorf("a region from %#x to %#x", r.from, r.to)
			}
			n += r.resident
		}
		return n, len(codeRegions())
	}
	before, regions := resident()
	if regions == 0 {
		t.Skip("/proc/self/smaps tells of no region of the program file without pages of its own")
	}
	dropCode()
	after, _ := resident()
	t.Logf("%d KiB before, %d after", before, after)
	if after >= before*3/4 { // what runs meanwhile, and this count, come back at once in pieces of 64 KiB
		t.Errorf("%d KiB of the program file were mapped, and %d still are", before, after)
	}
}
