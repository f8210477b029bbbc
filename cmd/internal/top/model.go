package top

import (
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

const (
	// every is the interval between two questions to viasocks.
	every = time.Second
	// maxFlows limits the number of flows that are asked for, the busiest first.
	maxFlows = 5000
	// maxFilter limits the length of the filter.
	maxFilter = 200
)

// Source provides what the view shows. A control.Client is one.
type Source interface {
	Status() (control.Status, error)
	Flows(limit int) (control.Flows, error)
}

// look asks once for status and flows.
func look(s Source) (snapshot, error) {
	status, err := s.Status()
	if err != nil {
		return snapshot{}, err
	}
	flows, err := s.Flows(maxFlows)
	return snapshot{time.Now(), status, flows}, err
}

// The messages of the model besides keys and sizes.
type (
	answer struct {
		snapshot
		err error
	}
	tick struct{}
)

// model is the state of the view.
type model struct {
	source Source
	alone  func() bool // the terminal was hung up, so nobody looks any more; nil: never
	traffic
	now           time.Time
	gone          error // why the last question failed; nil: it was answered
	width, height int

	sort    order
	reverse bool
	filter  string
	typing  bool // the filter is being typed
	paused  bool
	help    bool
	offset  int // the first row of the list of flows that is shown
}

func (m *model) Init() tea.Cmd { return m.after() }

// after schedules the next question.
func (m *model) after() tea.Cmd { return tea.Tick(every, func(time.Time) tea.Msg { return tick{} }) }

func (m *model) ask() tea.Msg {
	s, err := look(m.source)
	return answer{s, err}
}

func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case tick:
		// A terminal that is closed sends SIGHUP only to those whose controlling terminal it is.
		if m.alone != nil && m.alone() {
			return m, tea.Quit
		}
		return m, m.ask
	case answer:
		m.take(msg)
		return m, m.after()
	case tea.PasteMsg:
		if m.typing {
			m.setFilter(m.filter + msg.Content)
		}
	case tea.KeyPressMsg:
		if m.typing {
			return m, m.typed(msg)
		}
		return m, m.pressed(msg.String())
	}
	return m, nil
}

// take processes an answer of viasocks unless the view is paused. The next rates after a pause are averages over the
// whole pause.
func (m *model) take(a answer) {
	m.gone = a.err
	if a.err != nil || m.paused {
		return
	}
	m.add(a.snapshot)
	m.now = a.at
}

// pressed handles a key outside the filter.
func (m *model) pressed(key string) tea.Cmd {
	if m.help && key != "q" && key != "ctrl+c" {
		m.help = false
		return nil
	}
	switch key {
	case "q", "ctrl+c":
		return tea.Quit
	case "ctrl+z":
		return tea.Suspend
	case "?", "h", "f1":
		m.help = true
	case "s", "right":
		m.sort, m.offset = (m.sort+1)%orders, 0
	case "S", "shift+s", "left":
		m.sort, m.offset = (m.sort+orders-1)%orders, 0
	case "r":
		m.reverse, m.offset = !m.reverse, 0
	case "p", "space":
		m.paused = !m.paused
	case "/", "f":
		m.typing = true
	case "esc":
		m.setFilter("")
	case "down", "j":
		m.offset++
	case "up", "k":
		m.offset--
	case "pgdown", "ctrl+f":
		m.offset += m.page()
	case "pgup", "ctrl+b":
		m.offset -= m.page()
	case "home", "g":
		m.offset = 0
	case "end", "G", "shift+g":
		m.offset = len(m.rows)
	}
	m.offset = max(m.offset, 0)
	return nil
}

// typed handles a key inside the filter.
func (m *model) typed(key tea.KeyPressMsg) tea.Cmd {
	switch key.String() {
	case "ctrl+c":
		return tea.Quit
	case "enter":
		m.typing = false
	case "esc":
		m.typing = false
		m.setFilter("")
	case "ctrl+u":
		m.setFilter("")
	case "backspace":
		if r := []rune(m.filter); len(r) > 0 {
			m.setFilter(string(r[:len(r)-1]))
		}
	default:
		m.setFilter(m.filter + key.Text)
	}
	return nil
}

func (m *model) setFilter(s string) {
	s = plain(s)
	if r := []rune(s); len(r) > maxFilter {
		s = string(r[:maxFilter])
	}
	m.filter, m.offset = s, 0
}

func (m *model) View() tea.View {
	v := tea.NewView(m.draw())
	v.AltScreen = true
	return v
}
