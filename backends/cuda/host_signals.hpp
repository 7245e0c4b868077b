// Faults of kernels, and kernels that do not end, as texts: part of host_runtime.cpp, which has what it names.
#ifndef __SANITIZE_ADDRESS__  // which reports these itself
constexpr int SIGNALS[] = {SIGSEGV, SIGFPE, SIGVTALRM}, N_SIGNALS = 3;
struct sigaction before[N_SIGNALS];
timer_t timer;  // of the processor time of the thread that launches
unsigned limit_s;
stack_t stack_before;
sigjmp_buf escape;
pthread_t caller;
alignas(16) char signal_stack[64 << 10];  // a fiber's may be full

void on_signal(int signal, siginfo_t* info, void*) {
    bool of_kernel = current != nullptr && pthread_equal(pthread_self(), caller);
    if (!of_kernel && signal == SIGVTALRM) return;  // as it ended
    if (!of_kernel) {  // as if this had never been here
        for (int i = 0; i < N_SIGNALS; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        return;
    }
    if (signal == SIGFPE) say(true, "a divisor other than 0; got 0");
    else if (signal == SIGVTALRM) say(true, "an end within %u s of processor time; got none", limit_s);
    else if (stacks.contains(info->si_addr)) say(true, "variables within 60 KiB of stack; got more");
    else say(true, "addresses within buffers; got %p", info->si_addr);
    siglongjmp(escape, 1);
}

void catch_signals(unsigned seconds) {
    stack_t stack = {};
    stack.ss_sp = signal_stack, stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    caller = pthread_self();
    for (int i = 0; i < N_SIGNALS; i++) sigaction(SIGNALS[i], &action, &before[i]);
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID, event.sigev_signo = SIGVTALRM, event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
    itimerspec when = {};
    when.it_value.tv_sec = limit_s = seconds;
    timer_settime(timer, 0, &when, nullptr);
}

void release_signals() {
    timer_delete(timer);
    for (int i = 0; i < N_SIGNALS; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
}
#endif
